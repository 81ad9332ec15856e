"""`torch.compile` for a model's backbone, on the CPU."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models.preparation.replay import LayerOutputs, Reference, Refused
from models.preparation.variant import Variant

SIZES = (4, 1)
"""Batch sizes that are compiled, largest first: each takes tens of seconds, and four suffice."""

logger = logging.getLogger("heatlens.preparation")


def compiled_variant(module: nn.Module, reference: Reference, *, dtype: torch.dtype) -> Variant:
    """Compile a model's backbone up to its target layer, and make a variant of it.

    The module is on the CPU and of `dtype`; `reference` is what it gives in float32.

    Raises:
        Refused: there is no C++ compiler, or the compiled model fails or gives other tensors.
    """
    target = reference.head.layer
    try:
        backbone = CompiledBackbone(LayerOutputs(module, [target]), reference.images.to(dtype))
    except Exception as error:
        logger.warning("torch.compile does not take the model", exc_info=True)
        raise Refused("the compilation failed; the log says more") from error
    exact = dtype == torch.float32
    return reference.variant(backbone, [target], exact=exact, step="trunk by torch.compile")


class CompiledBackbone:
    """A backbone compiled for a few batch sizes; other batches run in parts of these."""

    def __init__(self, module: LayerOutputs, images: Tensor) -> None:
        """Compile for images like these, (N, 3, H, W), N at least the largest of `SIZES`."""
        self._dtype = images.dtype
        self._compiled = {size: _compile(module, images[:size]) for size in SIZES}

    def __call__(self, inputs: Tensor) -> tuple[Tensor]:
        """(N, 3, H, W) → the layer's output."""
        images = inputs.to(self._dtype).contiguous(memory_format=torch.channels_last)
        # One mode of autograd for all passes: another one would make it compile again, under way.
        with torch.inference_mode(mode=False), torch.no_grad():
            if images.is_inference():
                images = images.clone()
            with torch.compiler.set_stance("eager_on_recompile"):
                parts = [self._compiled[len(part)](part)[0] for part in _parts(images)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts),)


def _compile(module: LayerOutputs, images: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The module compiled for exactly these images' shape."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # Exported first: the hooks are then gone, and models do not share compiled code.
        exported = torch.export.export(module.eval(), (images,), strict=False).module()
        compiled: Callable[[Tensor], tuple[Tensor, ...]] = torch.compile(
            exported, dynamic=False, fullgraph=True, options={"freezing": True}
        )
        compiled(images)
    return compiled


def _parts(images: Tensor) -> Iterator[Tensor]:
    """A batch in parts of the compiled sizes, as few as can be."""
    start = 0
    for size in SIZES:
        while len(images) - start >= size:
            yield images[start : start + size]
            start += size
