"""From a loaded model to a warm one: probed, prepared for its device, and timed there."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
from msgspec import structs
from torch import Tensor

from models.cuda.graphs import Graphs
from models.cuda.recorder import GraphRecorder
from models.cuda.staging import CarefulUploads, CopyStream, Uploads
from models.errors import ModelLoadFailed
from models.fingerprint import Fingerprint
from models.head import HeadProbe, head_batch, probe_head
from models.layer_choice import (
    choose_by_value,
    choose_target_layer,
    feature_layers,
    has_gradient,
    matters,
)
from models.methods.applicability import ModelFacts, supported_methods, try_methods
from models.preparation.optimise import Findings, optimise
from models.preparation.precision import DTYPES
from models.preparation.race import processor
from models.preparation.variant import Needs, Variant
from models.probe import Trace, largest_batch, probe_batch, trace
from models.proof import LayerProof, Proofs, input_layouts, layer_infos, layouts_of, prove_layers
from models.proof_cache import ProofCache
from models.readout import PER_JOB
from models.sources import LoadedModel
from models.types import ModelCard, ModelInfo, Preprocess
from models.warm_model import WarmModel

logger = logging.getLogger("heatlens.engine")

WARMUP_S = 1.5
BATCH_SIZES = (1, 2, 4, 8, 16)
REPEATS = 3
WORTHWHILE = 0.9
"""Least share of the best rate that a smaller batch has to reach; its answers come sooner."""
OWN_MS = 5.0
"""What a batch costs beside its pass, on all cores: the engine's own code, the queue, the way to the
results, and in all processes that each batch wakes."""
UNDISTURBED = 0.85
"""Least share of the time for which threads that wanted a core had one while batches were timed."""


def warm_up(
    loaded: LoadedModel,
    device: torch.device,
    *,
    warmup_s: float = WARMUP_S,
    proofs_dir: Path | None = None,
) -> WarmModel:
    """Probe a loaded model on the CPU, move it to its device, and time it there.

    The probes run in float32 on the CPU whatever the device and precision, so that the same model
    gets the same target layer, head and methods everywhere. The loaded module itself is moved. What
    was proved of the same network before is read from `proofs_dir`.

    Raises:
        ModelLoadFailed: the configured target layer cannot be explained, or scores on the device
            are not finite.
    """
    probe = probe_batch(loaded.preprocess)[: largest_batch(loaded.module)]
    before = Fingerprint.of(loaded.module, probe)
    with ProofCache.of(loaded.module, before.scores, proofs_dir) as cache:
        return _timed(_prepared(loaded, device, probe, before, cache), warmup_s, cache)


def _prepared(
    loaded: LoadedModel, device: torch.device, probe: Tensor, before: Fingerprint, cache: ProofCache
) -> WarmModel:
    """Probe a model, and optimise it for its device."""
    spec, task = loaded.spec, loaded.task
    traced = trace(loaded.module, task, probe)
    proofs = cache.remember("layers", dict[str, LayerProof], lambda: prove_layers(traced))
    layouts = layouts_of(proofs)
    target, differentiable = _target_layer(spec.target_layer, traced, proofs)
    layout = None if target is None else layouts[target]
    head = HeadProbe(kind="flatten")
    # Where each job reads the output in its own way, no gradient is a row of weights.
    one_by_one = largest_batch(loaded.module) == 1
    if target is not None and differentiable and task not in PER_JOB and not one_by_one:
        images = head_batch(loaded.preprocess)
        head = probe_head(loaded.module, target, layout=layout, task=task, probe=images)
    facts = ModelFacts(
        target_layer=target,
        head=head.kind if differentiable else None,
        closed_form=head.closed_form,
        differentiable=traced.differentiable,
        layer_differentiable=differentiable,
        refusals=cache.remember(
            f"methods {task}", dict[str, str], lambda: try_methods(traced, proofs, task=task)
        ),
    )
    probed = probe, before.check(loaded.module, probe)

    def choose_features(fused: Variant | None) -> tuple[str, ...]:
        # Layers of the faster module, so that describing them costs no other pass.
        quick = {k: v for k, v in layouts.items() if fused is None or k in fused.readable}
        return feature_layers(traced, quick)

    findings = Findings(target, layout, head, choose_features)
    optimised = optimise(
        loaded.module, probed, spec=spec, device=device, findings=findings, cache=cache
    )
    dtype = DTYPES[optimised.precision]
    graphs = _graphs(device, dtype) if spec.cuda_graphs else None
    uploads = _uploads(device) if spec.copy_stream else None
    steps = optimised.steps if graphs is None else (*optimised.steps, "CUDA graphs")
    card = _card(loaded, device, facts)
    card = structs.replace(card, precision=optimised.precision, preparation=steps)
    if loaded.texts is not None:
        loaded.texts.prepare(loaded.labels, device)
        card = structs.replace(card, texts=loaded.texts.takes)
    scale, shift = _normalisation(loaded.preprocess)
    return WarmModel(
        name=spec.name,
        version=spec.version,
        module=optimised.module,
        variants=optimised.variants,
        device=device,
        dtype=dtype,
        scale=scale.to(device),
        shift=shift.to(device),
        task=task,
        target_layer=target,
        head=head.to(device),
        layouts=layouts,
        input_layouts=input_layouts(traced, layouts),
        texts=loaded.texts,
        other_inputs=frozenset(name for name, p in proofs.items() if not p.input_usable),
        info=ModelInfo(
            card=card,
            labels=loaded.labels,
            layers=layer_infos(traced, proofs, target_layer=target),
            feature_layers=optimised.features,
        ),
        uploads=uploads,
        graphs=graphs,
    )


def measure_latencies(
    run: Callable[[int], object],
    device: torch.device,
    *,
    budget_s: float,
    sizes: Sequence[int] = BATCH_SIZES,
) -> dict[int, float]:
    """Time passes of growing batch size, in rounds; each size runs once unmeasured before.

    A size is left out, and with it all larger ones, when its passes would exceed what is left of
    the budget; batch size 1 is measured in any case. Work queued on the device is waited for.

    Returns:
        Milliseconds of the fastest of up to 3 passes, by batch size.
    """
    deadline = time.monotonic() + budget_s
    seconds: dict[int, float] = {}
    for size in sizes:
        # A batch twice as large takes at most about twice as long; one pass warms up, one measures.
        least_s = 2 * 2 * seconds[size // 2] if seconds else 0.0
        if time.monotonic() + least_s > deadline and seconds:
            break
        _pass_s(run, size, device)
        seconds[size] = _pass_s(run, size, device)
    # In rounds: a machine that becomes slower meanwhile is so for all sizes.
    for _ in range(REPEATS - 1):
        for size, least_s in seconds.items():
            if time.monotonic() + least_s < deadline:
                seconds[size] = min(least_s, _pass_s(run, size, device))
    return {size: 1000 * least_s for size, least_s in seconds.items()}


def best_batch(latency_ms: Mapping[int, float]) -> int:
    """Return the smallest batch size whose answers per second come within a tenth of the best."""
    rates = {size: size / (latency + OWN_MS) for size, latency in latency_ms.items()}
    enough = WORTHWHILE * max(rates.values())
    return min(size for size, rate in rates.items() if rate >= enough)


def _graphs(device: torch.device, dtype: torch.dtype) -> Graphs | None:
    """Recorded passes, where the device has them."""
    if device.type != "cuda":
        return None
    try:
        return Graphs(GraphRecorder(device), dtype=dtype)
    except RuntimeError:
        logger.exception("CUDA graphs cannot be made; the model runs without")
        return None


def _uploads(device: torch.device) -> Uploads | None:
    """Uploads on a stream of their own, where the device has streams."""
    if device.type != "cuda":
        return None
    try:
        return CarefulUploads(CopyStream(device))
    except RuntimeError:
        logger.exception("a stream for uploads cannot be made; the model runs without")
        return None


def _target_layer(configured: str, traced: Trace, proofs: Proofs) -> tuple[str | None, bool]:
    """The layer to explain, if there is one, and whether a gradient of the scores reaches it."""
    layouts = layouts_of(proofs)
    if configured == "auto":
        chosen = choose_target_layer(traced, layouts)
        return chosen or choose_by_value(traced, layouts), chosen is not None
    if configured not in proofs:
        close = get_close_matches(configured, proofs, n=3)
        hint = f" Close names: {', '.join(close)}." if close else ""
        raise ModelLoadFailed(f"The model runs no layer named {configured}.{hint}")
    if configured not in layouts:
        reason = proofs[configured].reason
        raise ModelLoadFailed(f"target_layer {configured} cannot be explained: {reason}.")
    differentiable = has_gradient(traced, layouts, configured)
    if not differentiable and not matters(traced, configured):
        raise ModelLoadFailed(f"The scores do not depend on the map at target_layer {configured}.")
    return configured, differentiable


def _card(loaded: LoadedModel, device: torch.device, facts: ModelFacts) -> ModelCard:
    spec = loaded.spec
    return ModelCard(
        name=spec.name,
        version=spec.version,
        state="ready",
        ready=True,
        source=spec.source,
        devices=(str(device),),
        num_classes=loaded.num_classes,
        task=loaded.declared_task or loaded.task,
        input=loaded.preprocess,
        target_layer=facts.target_layer,
        head=facts.head,
        closed_form=facts.closed_form,
        methods=supported_methods(facts),
        notes=loaded.notes,
    )


def _normalisation(preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Scale and shift, (1, channels, 1, 1): (pixel / 255 - mean) / std = pixel · scale + shift."""
    statistics = torch.tensor([preprocess.mean, preprocess.std], dtype=torch.float64)
    mean, std = statistics.view(2, 1, -1, 1, 1)
    return (1 / (255 * std)).float(), (-mean / std).float()


def _timed(warm: WarmModel, warmup_s: float, cache: ProofCache) -> WarmModel:
    """Run the model by batch size, and return it with its latencies on the card.

    What was measured at an earlier start is believed: serving corrects it within a few batches.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (max(BATCH_SIZES), *warm.input_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    @torch.inference_mode()
    def run(size: int) -> Tensor:
        output: Tensor = warm.module_for(Needs())(warm.normalise(images[:size]))
        return output

    if not bool(run(1).isfinite().all()):
        raise ModelLoadFailed(
            f"The model's scores are not finite on {warm.device} in {warm.info.card.precision}."
        )
    card = warm.info.card
    place = (processor(warm.device), card.precision, *card.preparation, f"{warmup_s:g} s")
    what = f"times, {', '.join(place)}"
    latency_ms = cache.recall(what, dict[int, float])
    if latency_ms is None:
        sizes = BATCH_SIZES[: warm.largest_batch]
        ran_s, queued_s = time.process_time(), _queued_s()
        latency_ms = measure_latencies(run, warm.device, budget_s=warmup_s, sizes=sizes)
        ran_s, queued_s = time.process_time() - ran_s, _queued_s() - queued_s
        # What was measured while others had the cores is for this start only.
        if ran_s >= UNDISTURBED * (ran_s + queued_s):
            cache.keep(what, latency_ms)
    card = structs.replace(card, latency_ms=latency_ms, best_batch=best_batch(latency_ms))
    return replace(warm, info=structs.replace(warm.info, card=card))


def _queued_s() -> float:
    """Seconds for which this process's threads have waited for a core; 0 where no kernel tells."""
    waited_ns = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        # A thread may have ended meanwhile.
        with contextlib.suppress(OSError):
            waited_ns += int(file.read_text().split()[1])
    return waited_ns / 1e9


def _pass_s(run: Callable[[int], object], size: int, device: torch.device) -> float:
    """Seconds of one pass."""
    _synchronise(device)
    started = time.perf_counter()
    run(size)
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
