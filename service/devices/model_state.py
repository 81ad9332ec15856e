"""The state of the models, merged over the devices."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence

import msgspec

from models.catalog import ModelSpec
from models.types import ModelCard, ModelInfo, ModelKey, ModelState

_PREFERENCE: dict[ModelState, int] = {"ready": 0, "unloading": 1, "loading": 2, "unavailable": 3}


def with_fingerprint(info: ModelInfo) -> ModelInfo:
    """Add the fingerprint, a digest of all properties that requests are resolved against.

    It covers labels, classes, input and layers, so that a job runs only on the model that it was
    resolved against. It is the same on all devices and after a restart. Weights are left out:
    models that differ in nothing else accept the same requests.
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
    return msgspec.structs.replace(info, fingerprint=digest)


def loading_model(spec: ModelSpec) -> ModelInfo:
    """A model that is still being loaded, described by its configuration."""
    card = ModelCard(
        name=spec.name,
        version=spec.version,
        state="loading",
        ready=False,
        source=spec.source,
        task=spec.task or "single_label",
        precision=spec.precision,
        reason="The model is being loaded.",
    )
    return ModelInfo(card=card)


def merge(
    by_device: Mapping[str, Sequence[ModelInfo]],
    *,
    connected: Container[str],
    coming: Container[str],
) -> list[ModelInfo]:
    """Merge the models of all devices: one entry for each version, in order of appearance.

    A model is ready, and requests for it are accepted, if it is warm on a device or was warm on a
    device that is restarting.

    Args:
        by_device: the last report of each device.
        connected: devices with a running worker.
        coming: devices that run or will run again.
    """
    found: dict[ModelKey, dict[str, ModelInfo]] = {}
    for device, infos in by_device.items():
        for info in infos:
            found.setdefault(info.card.key, {})[device] = info
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
    """The latest report of a device, except that models it reloads after a restart stay known."""
    warm = {info.card.key: info for info in before if info.card.ready}
    return [warm.get(info.card.key, info) if info.card.state == "loading" else info for info in now]
