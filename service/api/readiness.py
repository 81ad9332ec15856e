"""Readiness to answer requests, and the reasons against it."""

from __future__ import annotations

from service.api.schemas import DeviceReadiness, ModelReadiness, ReadyResponse, derive
from service.devices.pool import DevicePool
from service.settings import Settings


def readiness(pool: DevicePool, settings: Settings) -> ReadyResponse:
    """Ready means a ready device, a warm model, and a default one that is not loading.

    A model that failed to load or was unloaded is named as missing and leaves the others ready.
    """
    devices = tuple(
        derive(DeviceReadiness, status, ready=status.state == "ready") for status in pool.devices()
    )
    models = tuple(derive(ModelReadiness, info.card) for info in pool.models())
    missing = [f"device {device.device}: {device.state}" for device in devices if not device.ready]
    missing += [f"model {m.name}@{m.version}: {m.state}" for m in models if not m.ready]
    known = {model.name for model in models}
    missing += [f"model {s.name}: not loaded" for s in settings.models if s.name not in known]
    if not devices:
        missing.append("no device is known yet")
    default = [model for model in models if model.name == settings.default_model]
    settled = not default or any(model.ready or model.state == "unavailable" for model in default)
    return ReadyResponse(
        ready=any(d.ready for d in devices) and any(m.ready for m in models) and settled,
        missing=tuple(missing),
        devices=devices,
        models=models,
    )
