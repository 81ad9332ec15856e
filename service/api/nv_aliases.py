"""The main metrics of Triton under Triton's names, made from our own, so that dashboards made for it show something.

Names and meaning:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from prometheus_client.core import Metric

from service.devices.pool import DeviceStatus

_STAGES = {
    "queue": "nv_inference_queue_duration_us",
    "decode": "nv_inference_compute_input_duration_us",
    "device": "nv_inference_compute_infer_duration_us",
    "render": "nv_inference_compute_output_duration_us",
}
_REASONS = {
    "overloaded": "REJECTED",
    "cancelled": "CANCELED",
    "internal": "BACKEND",
    "worker_lost": "BACKEND",
    "input_quarantined": "BACKEND",
}
_TEXTS = {
    "nv_inference_request_success": "Requests that were answered.",
    "nv_inference_request_failure": "Requests that failed.",
    "nv_inference_count": "Images that were answered.",
    "nv_inference_exec_count": "Batches that were started.",
    "nv_inference_request_duration_us": "Cumulative duration of requests in microseconds.",
    **{name: f"Cumulative duration of {stage} in microseconds." for stage, name in _STAGES.items()},
}

Labels = tuple[tuple[str, str], ...]


def nv_families(families: Iterable[Metric], statuses: Sequence[DeviceStatus]) -> list[Metric]:
    """Triton's names for what our own metrics say.

    Args:
        families: our own, as collected.
        statuses: of the devices, for the batches they ran.
    """
    values: dict[str, Counter[Labels]] = {name: Counter() for name in _TEXTS}
    for family in families:
        for sample in family.samples:
            _translate(sample.name, sample.labels, sample.value, values)
    for status in statuses:
        for count in status.batches:
            labels: Labels = (("model", count.model), ("version", count.version))
            values["nv_inference_exec_count"][labels] += count.batches
    found = []
    for name, text in _TEXTS.items():
        # Triton's counters lack the suffix that this library gives to counters.
        metric = Metric(name, text, "unknown")
        for labels, value in values[name].items():
            metric.add_sample(name, dict(labels), value)
        found.append(metric)
    return found


def _translate(
    name: str, given: dict[str, str], value: float, values: dict[str, Counter[Labels]]
) -> None:
    model: Labels = (("model", given.get("model", "")), ("version", given.get("version", "")))
    match name:
        case "heatlens_request_duration_seconds_count" if given["code"] == "ok":
            values["nv_inference_request_success"][model] += value  # type: ignore[assignment] # floats count as well
        case "heatlens_request_duration_seconds_count":
            reason = _REASONS.get(given["code"], "OTHER")
            values["nv_inference_request_failure"][*model, ("reason", reason)] += value  # type: ignore[assignment]
        case "heatlens_request_duration_seconds_sum":
            values["nv_inference_request_duration_us"][model] += round(1e6 * value)
        case "heatlens_stage_duration_seconds_sum":
            values[_STAGES[given["stage"]]][model] += round(1e6 * value)
        case "heatlens_stage_duration_seconds_count" if given["stage"] == "device":
            values["nv_inference_count"][model] += value  # type: ignore[assignment]
