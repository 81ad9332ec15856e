"""`torch.compile` for a model's trunk, on the CPU."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models.preparation.replay import LayerOutputs, Reference, Refused
from models.preparation.variant import Variant

SIZES = (4, 1)
"""Batch sizes that are compiled, most first: each takes tens of seconds, and four pictures gain nearly all there is."""

logger = logging.getLogger("heatlens.preparation")


def compiled_variant(module: nn.Module, reference: Reference, *, dtype: torch.dtype) -> Variant:
    """Compile a model's trunk up to its target layer, and make a variant of it.

    Args:
        module: the model, on the CPU, of `dtype`.
        reference: what it gives in float32.
        dtype: what it computes in.

    Raises:
        Refused: there is no C++ compiler, the model cannot be compiled, or it then gives other
            tensors.
    """
    target = reference.head.layer
    try:
        trunk = CompiledBackbone(LayerOutputs(module, [target]), reference.pictures.to(dtype))
    except Exception as error:
        logger.warning("torch.compile does not take the model", exc_info=True)
        raise Refused("the compilation failed; the log says more") from error
    return reference.variant(
        trunk, [target], exact=dtype == torch.float32, step="trunk by torch.compile"
    )


class CompiledBackbone:
    """A trunk compiled for a few batch sizes; other batches run in parts of these."""

    def __init__(self, module: LayerOutputs, pictures: Tensor) -> None:
        """Compile.

        Args:
            module: the trunk up to one layer, in eval mode.
            pictures: (N, 3, H, W) of its dtype, channels_last, N at least the largest of `SIZES`.
        """
        self._dtype = pictures.dtype
        self._compiled = {size: _compile(module, pictures[:size]) for size in SIZES}

    def __call__(self, inputs: Tensor) -> tuple[Tensor]:
        """(N, 3, H, W) → the layer's output."""
        pictures = inputs.to(self._dtype).contiguous(memory_format=torch.channels_last)
        # One mode of autograd for all passes: in another one it would be compiled again, under way.
        with torch.inference_mode(mode=False), torch.no_grad():
            if pictures.is_inference():
                pictures = pictures.clone()
            with torch.compiler.set_stance("eager_on_recompile"):
                parts = [self._compiled[len(part)](part)[0] for part in _parts(pictures)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts),)


def _compile(module: LayerOutputs, pictures: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The module compiled for exactly these pictures' shape."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # Exported first: the hooks are then gone, and no model shares its compiled code with
        # another.
        exported = torch.export.export(module.eval(), (pictures,), strict=False).module()
        compiled: Callable[[Tensor], tuple[Tensor, ...]] = torch.compile(
            exported, dynamic=False, fullgraph=True, options={"freezing": True}
        )
        compiled(pictures)
    return compiled


def _parts(pictures: Tensor) -> Iterator[Tensor]:
    """A batch in parts of the compiled sizes, as few as can be."""
    start = 0
    for size in SIZES:
        while len(pictures) - start >= size:
            yield pictures[start : start + size]
            start += size
