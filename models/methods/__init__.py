"""The METHODS table: every explanation method, described without torch.

A method is one function in the module its family names and one row in `rows/`; the API's enum,
`/v1/methods`, the docs and the property tests are made from the rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from models.methods.table import Method
from models.methods.rows import activation, gradient, perturbation, pixels, transformer

METHODS: dict[str, Method] = {
    row.name: row
    for family in (gradient, activation, perturbation, pixels, transformer)
    for row in family.ROWS
}
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
