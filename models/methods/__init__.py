"""The METHODS table: every explanation method, described without torch.

A method is one function in the module its `family` names and one row here; the API's enum, `/v1/methods`, the
docs and the property tests are made from the rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

from models.types import Struct

Family = Literal["gradient", "activation", "perturbation", "pixels", "transformer"]
Cost = Literal["pass", "head", "passes", "many"]


class Method(Struct):
    """One explanation method.

    Attributes:
        name: name in the API; also the name of the function in `models.methods.<family>`.
        paper: where it was defined.
        formula: what is computed, with A_k = channel k of the activation, g = its gradient, Z = its pixels.
        needs_gradients: whether the pass must be differentiated.
        signed: whether negative values of the map mean evidence against the class.
        cost: `pass` (free with the prediction), `head` (a pass of the head per target), `passes` (a few passes
            of the whole network), `many` (hundreds of passes: runs as steps).
        defaults: default `samples`, `steps`, `seed` and the like.
        assumes_nonnegative: whether the derivation needs a layer without negative values; on others the answer
            carries a warning.
    """

    name: str
    title: str
    paper: str
    formula: str
    family: Family
    needs_gradients: bool
    signed: bool
    cost: Cost
    defaults: dict[str, Any] = {}
    assumes_nonnegative: bool = False


_ROWS = (
    Method(
        name="cam",
        title="Class Activation Mapping",
        paper="Zhou et al. 2016, arXiv:1512.04150",
        formula="M = sum_k W_ck A_k",
        family="gradient",
        needs_gradients=True,
        signed=True,
        cost="pass",
    ),
    Method(
        name="gradcam",
        title="Grad-CAM",
        paper="Selvaraju et al. 2017, arXiv:1610.02391",
        formula="M = ReLU(sum_k w_k A_k), w_k = (1/Z) sum_ij g_kij",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
    ),
    Method(
        name="gradcam_plus_plus",
        title="Grad-CAM++",
        paper="Chattopadhay et al. 2018, arXiv:1710.11063, eq. 19",
        formula="M = ReLU(sum_k w_k A_k), w_k = sum over g_kij > 0 of g_kij / (2 + g_kij S_k), S_k = sum_ij A_kij",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
        assumes_nonnegative=True,
    ),
    Method(
        name="xgradcam",
        title="XGrad-CAM",
        paper="Fu et al. 2020, arXiv:2008.02312",
        formula="M = ReLU(sum_k w_k A_k), w_k = sum_ij g_kij A_kij / S_k, 0 where S_k vanishes",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
        assumes_nonnegative=True,
    ),
    Method(
        name="hirescam",
        title="HiResCAM",
        paper="Draelos and Carin 2020, arXiv:2011.08891",
        formula="M = ReLU(sum_k g_k * A_k)",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
    ),
    Method(
        name="layercam",
        title="LayerCAM",
        paper="Jiang et al. 2021, IEEE TIP 30",
        formula="M = ReLU(sum_k ReLU(g_k) * A_k)",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
"""Every method by name, in the order in which `/v1/methods` lists them."""


def implementation(name: str) -> Callable[..., Any]:
    """The function that computes a method; this is where torch is imported."""
    function: Callable[..., Any] = getattr(_module(name), name)
    return function


def weights_implementation(name: str) -> Callable[..., Any] | None:
    """The function that computes a method's channel weights, where the method defines such."""
    return getattr(_module(name), f"{name}_weights", None)


def _module(name: str) -> Any:
    return importlib.import_module(f"models.methods.{METHODS[name].family}")
