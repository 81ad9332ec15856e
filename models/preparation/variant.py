"""Faster variants of a model, and the proof that they give the same tensors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.hooks import ForwardHook, HookStack
from models.preparation.fusion import fuse_convolutions
from models.proof_cache import ProofCache

logger = logging.getLogger("heatlens.preparation")

TOLERANCE = 1e-4
"""Largest difference of a layer's float32 tensor from the original's, relative to its peak."""

GRADIENT_TOLERANCE = 1e-2
"""Largest norm of the difference of a layer's gradients, relative to the original's norm.

Rounding may turn single ReLUs on or off; a lost path is another order of magnitude.
"""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a pass reads from a module and does to it.

    Attributes:
        reads: layers whose output is tapped.
        rewrites: layers whose output is changed, or where the scores are differentiated.
        layer_inputs: whether inputs of layers are tapped.
        input_gradient: whether the scores are differentiated at the images.
    """

    reads: frozenset[str] = frozenset()
    rewrites: frozenset[str] = frozenset()
    layer_inputs: bool = False
    input_gradient: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """A module that answers like the original, faster.

    Passes that need more run on a slower variant, or on the original. Inputs of its layers are
    never those of the original: a variant keeps what layers return, not how they compute it.

    Attributes:
        module: the variant; eval mode, parameters frozen.
        step: what was done to make it, for the model card.
        readable: layers whose outputs were found equal to the original's.
        rewritable: layers whose output can be changed, and differentiated at: with a graph, too,
            they have the original's values, and they have its gradient.
        differentiable: whether the images have the original's gradient.
        works: whether it could be made after all, where that is done beside the serving.
    """

    module: nn.Module
    step: str
    readable: frozenset[str]
    rewritable: frozenset[str]
    differentiable: bool
    works: Callable[[], bool] = lambda: True

    def serves(self, needs: Needs) -> bool:
        """Whether a pass with these needs can run here."""
        return (
            self.readable >= needs.reads
            and self.rewritable >= needs.rewrites
            and (self.differentiable or not needs.input_gradient)
            and not needs.layer_inputs
            and self.works()
        )


@dataclass(frozen=True, kw_only=True)
class _Equality:
    """In which layers a variant equals the original; see `Variant`."""

    readable: frozenset[str]
    rewritable: frozenset[str]
    differentiable: bool


def fused_variant(
    module: nn.Module, probe: Tensor, cache: ProofCache | None = None
) -> Variant | None:
    """Make a variant with fused convolutions and check it against the original, in float32.

    The module is in eval mode and left as it is; the probe (N, 3, H, W) is of the size that will be
    served. None where nothing could be fused or the scores differ by more than `TOLERANCE`. What
    `cache` holds of its layers is not proved again; the scores always are.
    """
    cache = cache or ProofCache(None)
    try:
        variant, fused = fuse_convolutions(copy.deepcopy(module))
        if not fused:
            return None
        with torch.inference_mode():
            equal = close(variant(probe), module(probe))
        proved = cache.remember("fusion", _Equality, lambda: _equality(variant, module, probe))
    # A model that cannot be rewritten is served as it is.
    except Exception:
        logger.warning("the fused convolutions fail", exc_info=True)
        return None
    if not equal:
        return None
    return Variant(
        module=variant,
        step=f"{fused} fused convolutions",
        readable=proved.readable,
        rewritable=proved.rewritable,
        differentiable=proved.differentiable,
    )


_Pair = tuple[Tensor, Tensor | None]
"""A tensor, and the gradient of a mixture of all scores there; None if no score depends on it."""


def _equality(variant: nn.Module, module: nn.Module, probe: Tensor) -> _Equality:
    """Compare the layers of a variant with the original's, by value and by gradient."""
    expected, found = layer_outputs(module, probe), layer_outputs(variant, probe)
    same = equal_layers(found, expected, close)
    exact, recorded = (_differentiated(m, probe[:1], same) for m in (module, variant))
    proved = {name for name, other in exact.items() if _agree(recorded.get(name), other)}
    return _Equality(
        readable=same, rewritable=frozenset(proved) - {""}, differentiable="" in proved
    )


def _differentiated(module: nn.Module, images: Tensor, layers: Collection[str]) -> dict[str, _Pair]:
    """The pairs of some layers by name, and that of the images under the empty name."""
    leaf = images.detach().requires_grad_()
    outputs: dict[str, Tensor] = {"": leaf}

    def record(name: str) -> ForwardHook:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            outputs[name] = output
            # A copy: successors may work in place.
            return output.clone()

        return hook

    with torch.enable_grad(), HookStack() as hooks:
        for name in layers:
            hooks.forward(module.get_submodule(name), record(name))
        scores: Tensor = module(leaf.clone())
    tensors = {name: output for name, output in outputs.items() if output.requires_grad}
    gradients: Sequence[Tensor | None] = [None] * len(tensors)
    if scores.requires_grad:
        # Weighted, since plain sums may cancel.
        weights = torch.arange(1.0, 1 + scores.shape[1]) / scores.shape[1]
        # Scores of pixels have two dimensions more.
        mixture = (scores.transpose(1, -1) * weights).sum()
        gradients = torch.autograd.grad(mixture, list(tensors.values()), allow_unused=True)
    by_name = dict(zip(tensors, gradients, strict=True))
    return {name: (output.detach(), by_name.get(name)) for name, output in outputs.items()}


def _agree(found: _Pair | None, expected: _Pair) -> bool:
    """Whether a layer of a variant has the original's values and gradient where a graph is made."""
    if found is None or not close(found[0], expected[0]):
        return False
    if found[1] is None or expected[1] is None:
        return found[1] is expected[1]
    error = torch.linalg.vector_norm(found[1] - expected[1])
    return bool(error <= GRADIENT_TOLERANCE * torch.linalg.vector_norm(expected[1]))


def layer_outputs(
    module: nn.Module, probe: Tensor, *, layers: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Outputs by layer name (of all layers or some), the scores under the empty name.

    Layers that are called more than once are left out.
    """
    outputs: dict[str, Tensor | None] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            single = isinstance(output, Tensor) and name not in outputs
            # A copy: successors may work in place.
            outputs[name] = output.clone() if single else None

        return hook

    with torch.inference_mode(), HookStack() as hooks:
        for name, child in module.named_modules():
            if name and (layers is None or name in layers):
                hooks.forward(child, record(name))
        outputs[""] = module(probe)
    return {name: output for name, output in outputs.items() if output is not None}


def equal_layers(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    equal: Callable[[Tensor, Tensor], bool],
) -> frozenset[str]:
    """Names of the layers whose outputs are equal."""
    same = [n for n, out in found.items() if n in expected and equal(out, expected[n])]
    return frozenset(same) - {""}


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by at most `TOLERANCE` of the largest value."""
    if found.shape != expected.shape:
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= TOLERANCE * expected.float().abs().max())
