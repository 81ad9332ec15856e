"""What is known of the models, put together from several devices."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence

import msgspec

from models.catalog import ModelSpec
from models.types import ModelCard, ModelInfo, ModelState

_PREFERENCE: dict[ModelState, int] = {"ready": 0, "unloading": 1, "loading": 2, "unavailable": 3}


def loading_model(spec: ModelSpec) -> ModelInfo:
    """A model of which only the configuration is known yet."""
    card = ModelCard(
        name=spec.name,
        version=spec.version,
        state="loading",
        ready=False,
        source=spec.source,
        task=spec.task,
        precision=spec.precision,
        reason="The model is being loaded.",
    )
    return ModelInfo(card=card)


def job_ms(card: ModelCard) -> float:
    """Device time that a job adds, as far as the warm-up knows: its part of the best batch."""
    return card.latency_ms.get(card.best_batch, 10.0) / max(1, card.best_batch)


def merge(
    by_device: Mapping[str, Sequence[ModelInfo]],
    *,
    connected: Container[str],
    coming: Container[str],
) -> list[ModelInfo]:
    """One entry for each model version, in order of appearance.

    A model is ready if requests for it are taken: it is warm on a device, or was, and the device is
    coming back.

    Args:
        by_device: what each device said last.
        connected: devices whose worker runs.
        coming: devices that run or will run again.
    """
    found: dict[tuple[str, str], dict[str, ModelInfo]] = {}
    for device, infos in by_device.items():
        for info in infos:
            found.setdefault((info.card.name, info.card.version), {})[device] = info
    versions: dict[str, tuple[str, ...]] = {}
    for name, version in found:
        versions[name] = (*versions.get(name, ()), version)
    merged = []
    for (name, _), entries in found.items():
        best = min(entries.values(), key=lambda info: _PREFERENCE[info.card.state])
        warm = [device for device, info in entries.items() if info.card.ready]
        card = msgspec.structs.replace(
            best.card,
            ready=any(device in coming for device in warm),
            devices=tuple(device for device in warm if device in connected),
            versions=versions[name],
        )
        merged.append(msgspec.structs.replace(best, card=card))
    return merged


def keep_known_models(before: Sequence[ModelInfo], now: Sequence[ModelInfo]) -> list[ModelInfo]:
    """What a device says now, but what it knew of a model before while it loads that again after a restart."""
    warm = {(info.card.name, info.card.version): info for info in before if info.card.ready}
    return [
        warm.get((info.card.name, info.card.version), info)
        if info.card.state == "loading"
        else info
        for info in now
    ]


# ---------------------------------------------------------------- revision


def with_fingerprint(info: ModelInfo) -> ModelInfo:
    """Put `fingerprint` on the card: a digest of labels, classes, input and layers.

    Devices that hold the same model agree on it, and so does a worker after its restart. Weights
    are left out: two models that differ in nothing else answer the same requests, each as a whole.
    """
    card = info.card
    resolved = (
        info.labels,
        card.num_classes,
        card.task,
        card.input,
        [(layer.name, layer.output_shape, layer.spatial) for layer in info.layers],
    )
    digest = hashlib.blake2b(msgspec.msgpack.encode(resolved), digest_size=8).hexdigest()
    return msgspec.structs.replace(info, card=msgspec.structs.replace(card, fingerprint=digest))
