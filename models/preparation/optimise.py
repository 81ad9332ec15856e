"""Optimises a model for its device, step by step, each step with its own check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.catalog import ModelSpec
from models.head import HeadProbe
from models.layers import TokenLayout
from models.preparation.compiled import compiled_variant
from models.preparation.openvino import openvino_variants
from models.preparation.precision import (
    DTYPES,
    LEAST_COSINE,
    cast,
    cosine,
    has_instructions,
)
from models.preparation.replay import PooledHead, Reference, Refused
from models.preparation.variant import Variant, fused_variant
from models.types import Precision


@dataclass(frozen=True, eq=False)
class Findings:
    """What the probes found out that the preparation builds on.

    Attributes:
        target_layer, layout, head: the `auto` layer if there is one, its layout, what follows it.
        choose_features: the layers to describe by default, given the fused variant if there is one.
    """

    target_layer: str | None
    layout: TokenLayout | None
    head: HeadProbe
    choose_features: Callable[[Variant | None], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimised:
    """A model in the form in which it is served.

    Attributes:
        module: the model as it is, on its device, channels_last, of `precision`.
        variants: its faster variants there, the fastest first.
        features: layers that are described by default.
        precision: the precision served; float32 where the one asked for failed its check.
        steps: what was done, and what was skipped and why, for the model card.
    """

    module: nn.Module
    variants: tuple[Variant, ...]
    features: tuple[str, ...]
    precision: Precision
    steps: tuple[str, ...]


def optimise(
    module: nn.Module, probe: Tensor, *, spec: ModelSpec, device: torch.device, findings: Findings
) -> Optimised:
    """Optimise a model for its device, with the precision and runtime that its entry asks for.

    The module is frozen, float32 and on the CPU, and is moved; the probe (N, 3, H, W) is of the
    size that will be served.
    """
    # The stub lacks this overload.
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    probe = probe.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = module(probe)
    steps = ["channels_last"]
    fused = fused_variant(module, probe)
    steps.append("fusion skipped: nothing to fuse" if fused is None else fused.step)
    features = findings.choose_features(fused)
    precision = spec.precision
    if not has_instructions(device, precision):
        steps.append(f"{precision} skipped: the device has no instructions for it")
        precision = "fp32"
    precision = _precision(precision, module, (probe, expected), steps)
    replays: list[Variant] = []
    reference: Reference | None = None
    runtime = "torch.compile" if spec.compile else spec.runtime
    if runtime != "torch":
        with _skipping(runtime, steps):
            head = _head(findings, device, outputs=expected.shape[1])
            reference = Reference(module, probe, head=head, features=features)
    if reference and runtime == "openvino":
        with _skipping(runtime, steps):
            replays, served = openvino_variants(module, reference, precision=precision)
            if served != precision:
                reason = f"OpenVINO has no {precision} on this CPU"
                steps.append(f"{served} instead of {precision}: {reason}")
            precision = served
    dtype, outputs = DTYPES[precision], expected.shape[1]
    placed = cast(module.to(device), dtype, outputs=outputs)
    if reference and runtime == "torch.compile":
        with _skipping(runtime, steps):
            replays = [compiled_variant(placed, reference, dtype=dtype)]
    steps += [variant.step for variant in replays]
    if fused is not None:
        fused = replace(fused, module=cast(fused.module.to(device), dtype, outputs=outputs))
    return Optimised(
        module=placed,
        variants=(*replays, *([fused] if fused else [])),
        features=features,
        precision=precision,
        steps=tuple(steps),
    )


@contextmanager
def _skipping(step: str, steps: list[str]) -> Iterator[None]:
    """Go on without a step that is refused, and say why."""
    try:
        yield
    except Refused as reason:
        steps.append(f"{step} skipped: {reason}")


def _head(findings: Findings, device: torch.device, *, outputs: int) -> PooledHead:
    """What makes the scores of a replayed backbone; refused where none can be replayed."""
    if device.type != "cpu":
        raise Refused("it is for the CPU")
    if findings.target_layer is None:
        raise Refused("the model has no target layer")
    return PooledHead.of(
        findings.head, layer=findings.target_layer, layout=findings.layout, outputs=outputs
    )


def _precision(
    asked: Precision, module: nn.Module, probed: tuple[Tensor, Tensor], steps: list[str]
) -> Precision:
    """The precision asked for if its scores are good enough, else float32."""
    if asked == "fp32":
        return asked
    probe, expected = probed
    half = cast(copy.deepcopy(module), DTYPES[asked], outputs=expected.shape[1])
    with torch.inference_mode():
        fidelity = cosine(half(probe.to(DTYPES[asked])), expected)
    # Written so that NaN is refused, too.
    if not fidelity >= LEAST_COSINE:
        steps.append(f"{asked} skipped: its scores have cosine {fidelity:.3f} with float32's")
        return "fp32"
    steps.append(f"{asked}, cosine of scores with float32's {fidelity:.4f}")
    return asked
