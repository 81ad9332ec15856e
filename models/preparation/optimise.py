"""Optimises a model for its device, step by step, each step with its own check."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.catalog import ModelSpec
from models.head import HeadProbe
from models.heap import release_heap
from models.layers import TokenLayout
from models.preparation.precision import (
    DTYPES,
    LEAST_COSINE,
    alike,
    cast,
    cosine,
    has_instructions,
)
from models.preparation.race import processor
from models.preparation.replay import PooledHead, Reference, Refused
from models.preparation.runtimes import ByTorch, Trial
from models.preparation.variant import Variant, close, fused_variant
from models.proof_cache import ProofCache
from models.types import Precision

T = TypeVar("T")

logger = logging.getLogger("heatlens.preparation")


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
    module: nn.Module,
    probed: tuple[Tensor, Tensor],
    *,
    spec: ModelSpec,
    device: torch.device,
    findings: Findings,
    cache: ProofCache | None = None,
) -> Optimised:
    """Optimise a model for its device, with the precision and runtime that its entry asks for.

    The module is frozen, float32 and on the CPU, and is moved; what was probed are images
    (N, 3, H, W) of the size that will be served, and the module's scores of them.
    """
    steps: list[str] = []
    probe, expected = probed
    probe = probe.contiguous(memory_format=torch.channels_last)
    probed = probe, expected
    moved = _attempt("channels_last", steps, lambda: _channels_last(module, probed))
    if moved is not None:
        module = moved
        steps.append("channels_last")
    fused = fused_variant(module, probe, cache)
    steps.append("fusion skipped: nothing to fuse" if fused is None else fused.step)
    features = findings.choose_features(fused)
    cache = cache or ProofCache(None)
    precision = _precision(spec.precision, module, probed, device, steps=steps, cache=cache)
    trial = Trial(spec.runtime, cache, precision=precision)

    def convert() -> tuple[list[Variant], Precision]:
        head = _head(findings, device, outputs=expected.shape[1])
        trial.check_worth(module if fused is None else fused.module, probe[:1])
        reference = Reference(module, probed, head=head, features=features, cache=cache)
        return trial.variants(module, reference)

    replays: list[Variant] = []
    if trial.wanted(device):
        # Another runtime has a heap of its own: what the proofs have left is of no use to it.
        release_heap()
        replays, precision = _attempt("openvino", steps, convert) or ([], precision)
    dtype, outputs = DTYPES[precision], expected.shape[1]
    if fused is not None and dtype != torch.float32:
        whole = fused
        fused = _attempt("fusion", steps, lambda: _in_half(whole, dtype, probed))
    if fused is not None:
        fused = replace(fused, module=fused.module.to(device))
    variants = (fused,) if fused else ()
    module = cast(module.to(device), dtype, outputs=outputs)
    if replays:
        release_heap()
        images = probe.to(dtype)
        by_torch = ByTorch(module=module, variants=variants, features=features, images=images)
        replays = trial.faster(replays, by_torch)
    return Optimised(
        module=module,
        variants=(*replays, *variants),
        features=features,
        precision=precision,
        steps=(*steps, *trial.steps),
    )


def _attempt(step: str, steps: list[str], work: Callable[[], T]) -> T | None:
    """What a step makes; None, and the reason among the steps, where it is refused or fails."""
    try:
        return work()
    except Refused as reason:
        steps.append(f"{step} skipped: {reason}")
    except Exception as error:
        logger.warning("%s fails on the network", step, exc_info=True)
        steps.append(f"{step} skipped: it fails ({type(error).__name__}); the log says more")
    return None


def _channels_last(module: nn.Module, probed: tuple[Tensor, Tensor]) -> nn.Module:
    """A copy of the module in channels_last memory, if it gives the same."""
    probe, expected = probed
    moved = copy.deepcopy(module)
    for tensor in (*moved.parameters(), *moved.buffers()):
        # Torch's own conversion refuses tensors of five dimensions.
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        if not close(moved(probe), expected):
            raise Refused("the scores differ")
    return moved


def _head(findings: Findings, device: torch.device, *, outputs: int) -> PooledHead:
    """What makes the scores of a replayed backbone; refused where none can be replayed."""
    if device.type != "cpu":
        raise Refused("it is for the CPU")
    if findings.target_layer is None:
        raise Refused("the model has no target layer")
    if "#" in findings.target_layer:
        raise Refused("the target layer is one of several calls of a module")
    return PooledHead.of(
        findings.head, layer=findings.target_layer, layout=findings.layout, outputs=outputs
    )


def _precision(
    asked: Precision,
    module: nn.Module,
    probed: tuple[Tensor, Tensor],
    device: torch.device,
    *,
    steps: list[str],
    cache: ProofCache,
) -> Precision:
    """The precision asked for if the device has it and its scores are good enough, else float32."""
    if asked == "fp32":
        return asked

    def measure() -> float:
        probe, expected = probed
        half = cast(copy.deepcopy(module), DTYPES[asked], outputs=expected.shape[1])
        with torch.inference_mode():
            return cosine(half(probe.to(DTYPES[asked])), expected)

    def fidelity() -> float:
        if not has_instructions(device, asked):
            raise Refused("the device has no instructions for it")
        found = cache.remember(f"{asked}, {processor(device)}", float, measure)
        # Written so that NaN is refused, too.
        if not found >= LEAST_COSINE:
            raise Refused(f"its scores have cosine {found:.3f} with float32's")
        return found

    found = _attempt(asked, steps, fidelity)
    if found is None:
        return "fp32"
    steps.append(f"{asked}, cosine of scores with float32's {found:.4f}")
    return asked


def _in_half(fused: Variant, dtype: torch.dtype, probed: tuple[Tensor, Tensor]) -> Variant:
    """The fused variant in half precision, if it answers there."""
    probe, expected = probed
    module = cast(fused.module, dtype, outputs=expected.shape[1])
    with torch.inference_mode():
        if not alike(module(probe.to(dtype)), expected):
            raise Refused("its scores in half precision differ from float32's")
    return replace(fused, module=module)
