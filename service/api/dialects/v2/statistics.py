"""`/v2/models…/stats`: Triton's statistics, from the counters that `/metrics` shows."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence

from fastapi import APIRouter, Response
from msgspec import structs
from prometheus_client.core import Metric

from models.types import ModelInfo
from service.api.dependencies import Service, ServiceDep
from service.api.dialects.v2.metadata import find
from service.api.dialects.v2.schemas import (
    InferStatistics,
    ModelStatistics,
    ModelStatisticsList,
    StatisticDuration,
)
from service.api.handler import json_response
from service.api.metrics import LAST_REQUEST, REQUEST_SECONDS, STAGE_SECONDS
from service.api.openapi import KEYED, MODEL, responses

router = APIRouter(prefix="/v2/models", tags=["v2"], default_response_class=Response)

_ALL = responses(ModelStatisticsList, "Statistics of every model version.", errors=KEYED)
_ONE = responses(ModelStatisticsList, "Statistics of the model version.", errors=MODEL)

_STAGES = {
    "queue": "queue",
    "decode": "compute_input",
    "device": "compute_infer",
    "render": "compute_output",
}
_Key = tuple[str, str, str]
"""Model, version and the name of a statistic."""


@router.get("/stats", summary="Statistics of all models", responses=_ALL)
async def show_all(service: ServiceDep) -> Response:
    """Counts and durations since the service started, of all HTTP processes together."""
    return await _statistics(service, service.pool.models())


@router.get("/{model}/stats", summary="Statistics of a model", responses=_ONE)
@router.get("/{model}/versions/{version}/stats", summary="Statistics of a model", responses=_ONE)
async def show_one(service: ServiceDep, model: str, version: str | None = None) -> Response:
    """Counts and durations since the service started; predictions and explanations together."""
    info = find(service, model, version)
    found = [known for known in service.pool.models() if known.card.name == info.card.name]
    return await _statistics(service, found if version is None else [info])


async def _statistics(service: Service, infos: Sequence[ModelInfo]) -> Response:
    families = await asyncio.to_thread(lambda: list(service.metrics.collect()))
    durations, last = _totals(families)
    batches: defaultdict[tuple[str, str], int] = defaultdict(int)
    for device in service.pool.devices():
        for count in device.batches:
            batches[count.model, count.version] += count.batches
    found = []
    for card in (info.card for info in infos):
        key = card.key
        names = InferStatistics.__struct_fields__
        stats = InferStatistics(**{name: durations[*key, name] for name in names})
        found.append(
            ModelStatistics(
                name=card.name,
                version=card.version,
                last_inference=round(1000 * last[key]),
                inference_count=stats.compute_infer.count,
                execution_count=batches[key],
                inference_stats=stats,
            )
        )
    return json_response(ModelStatisticsList(model_stats=tuple(found)))


def _totals(
    families: Iterable[Metric],
) -> tuple[defaultdict[_Key, StatisticDuration], defaultdict[tuple[str, str], float]]:
    """Durations by model, version and statistic, and when each model version last answered."""
    durations: defaultdict[_Key, StatisticDuration] = defaultdict(StatisticDuration)
    last: defaultdict[tuple[str, str], float] = defaultdict(float)
    for sample in (sample for family in families for sample in family.samples):
        name, _, part = sample.name.rpartition("_")
        labels = sample.labels
        if sample.name == LAST_REQUEST:
            last[labels["model"], labels["version"]] = sample.value
        elif part in ("sum", "count") and name in (REQUEST_SECONDS, STAGE_SECONDS):
            ended = "success" if labels.get("code") == "ok" else "fail"
            statistic = ended if name == REQUEST_SECONDS else _STAGES[labels["stage"]]
            key = (labels["model"], labels["version"], statistic)
            known = durations[key]
            durations[key] = (
                structs.replace(known, count=known.count + round(sample.value))
                if part == "count"
                else structs.replace(known, ns=known.ns + round(1e9 * sample.value))
            )
    return durations, last
