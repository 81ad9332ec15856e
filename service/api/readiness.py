"""Readiness to answer requests, and the reasons against it."""

from __future__ import annotations

from service.api.schemas import DeviceReadiness, ModelReadiness, ReadyResponse, derive
from service.devices.pool import DevicePool, DeviceStatus
from service.settings import Settings


def is_up(status: DeviceStatus, *, within_s: float) -> bool:
    """Whether a device is ready and has completed a real pass recently."""
    recent = status.last_pass_s is not None and status.last_pass_s <= within_s
    return status.state == "ready" and recent


def readiness(pool: DevicePool, settings: Settings) -> ReadyResponse:
    """Ready means a recent pass on a device, a warm model, and a default one that is not loading.

    A model that failed to load or was unloaded is named as missing and leaves the others ready.
    """
    within_s = settings.server.ready_within_s
    devices = tuple(
        derive(DeviceReadiness, status, ready=is_up(status, within_s=within_s))
        for status in pool.devices()
    )
    models = tuple(derive(ModelReadiness, info.card) for info in pool.models())
    missing = [*map(_missing_device, devices), *map(_missing_model, models)]
    known = {model.name for model in models}
    missing += [f"model {s.name}: not loaded" for s in settings.models if s.name not in known]
    if not devices:
        missing.append("no device is known yet")
    default = [model for model in models if model.name == settings.default_model]
    settled = not default or any(model.ready or model.state == "unavailable" for model in default)
    return ReadyResponse(
        ready=any(d.ready for d in devices) and any(m.ready for m in models) and settled,
        missing=tuple(text for text in missing if text),
        devices=devices,
        models=models,
    )


def _missing_device(device: DeviceReadiness) -> str:
    if device.ready:
        return ""
    if device.state == "ready":
        return f"device {device.device}: no recent pass"
    return f"device {device.device}: {device.state}"


def _missing_model(model: ModelReadiness) -> str:
    return "" if model.ready else f"model {model.name}@{model.version}: {model.state}"
