"""All load-time preparation of a model, step by step, each with its own check."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.preparation.precision import (
    DTYPES,
    LEAST_COSINE,
    cast,
    cosine,
    has_instructions,
)
from models.preparation.twin import Twin, fused_twin
from models.types import Precision


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A model in the form in which it is served.

    Attributes:
        module: the model as it is, on its device, channels_last, of `precision`.
        twin: its faster twin there, if one could be made.
        precision: the precision served; float32 where the one asked for failed its check.
        steps: what was done, and what was skipped and why, for the model card.
    """

    module: nn.Module
    twin: Twin | None
    precision: Precision
    steps: tuple[str, ...]


def prepare_module(
    module: nn.Module, probe: Tensor, *, device: torch.device, precision: Precision
) -> Prepared:
    """Prepare a model for its device.

    Args:
        module: on the CPU, float32, eval mode, parameters frozen; it is moved.
        probe: (N, 3, H, W) normalised float32 on the CPU, of the size that will be served.
        device: where it will be served.
        precision: what its parameters are cast to.
    """
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stub lacks it
    probe = probe.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = module(probe)
    steps = ["channels_last"]
    twin = fused_twin(module, probe)
    steps.append(
        "fusion skipped: nothing to fuse" if twin is None else f"{twin.fused} fused convolutions"
    )
    if not has_instructions(device, precision):
        steps.append(f"{precision} skipped: the device has no instructions for it")
        precision = "fp32"
    if precision != "fp32":
        fidelity = _fidelity(module, probe, expected, DTYPES[precision])
        if not fidelity >= LEAST_COSINE:  # not a number is no fidelity
            steps.append(
                f"{precision} skipped: its scores have cosine {fidelity:.3f} with float32's"
            )
            precision = "fp32"
        else:
            steps.append(f"{precision}, cosine of scores with float32's {fidelity:.4f}")
    dtype, outputs = DTYPES[precision], expected.shape[1]
    placed = cast(module.to(device), dtype, outputs=outputs)
    if twin is not None:
        twin = replace(twin, module=cast(twin.module.to(device), dtype, outputs=outputs))
    return Prepared(module=placed, twin=twin, precision=precision, steps=tuple(steps))


def _fidelity(module: nn.Module, probe: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Cosine of the scores of a half-precision copy with those of float32."""
    half = cast(copy.deepcopy(module), dtype, outputs=expected.shape[1])
    with torch.inference_mode():
        return cosine(half(probe.to(dtype)), expected)
