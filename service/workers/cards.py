"""What is known of the models, put together from several devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from models.catalog import ModelSpec
from models.types import ModelCard, ModelInfo, ModelState

_PREFERENCE: dict[ModelState, int] = {"ready": 0, "unloading": 1, "loading": 2, "unavailable": 3}


def loading_info(spec: ModelSpec) -> ModelInfo:
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


def merge(by_device: Mapping[str, Sequence[ModelInfo]], *, up: Iterable[str]) -> list[ModelInfo]:
    """One entry for each model version, in order of appearance.

    What a device that is down last said still counts, so that requests can be checked, and wait, while it
    restarts; but only devices that are up make a model ready.

    Args:
        by_device: what each device said last.
        up: devices that are connected.
    """
    live = set(up)
    found: dict[tuple[str, str], dict[str, ModelInfo]] = {}
    for device, infos in by_device.items():
        for info in infos:
            found.setdefault((info.card.name, info.card.version), {})[device] = info
    versions: dict[str, tuple[str, ...]] = {}
    for name, version in found:
        versions[name] = (*versions.get(name, ()), version)
    return [
        _merged(entries, live=live, versions=versions[name]) for (name, _), entries in found.items()
    ]


def _merged(
    entries: Mapping[str, ModelInfo], *, live: set[str], versions: tuple[str, ...]
) -> ModelInfo:
    best = min(entries.values(), key=lambda info: _PREFERENCE[info.card.state])
    devices = tuple(d for d, info in entries.items() if d in live and info.card.ready)
    card = msgspec.structs.replace(
        best.card, ready=bool(devices), devices=devices, versions=versions
    )
    return msgspec.structs.replace(best, card=card)
