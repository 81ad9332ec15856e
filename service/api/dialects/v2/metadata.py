"""`/v2…`: the server and its health, and what is known of each model."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from fastapi import APIRouter, Request, Response
from msgspec import UNSET
from prometheus_client.core import Metric

from models.types import ModelInfo
from service.api.dependencies import Service, ServiceDep
from service.api.dialects.v2.inference import EXPLAIN_SUFFIX
from service.api.dialects.v2.outputs import EXPLAIN, PREDICT, OutputKind
from service.api.dialects.v2.schemas import (
    DynamicBatching,
    InferStatistics,
    ModelConfig,
    ModelHealth,
    ModelMetadata,
    ModelNames,
    ModelStatistics,
    ModelStatisticsList,
    ServerHealth,
    ServerMetadata,
    StatisticDuration,
    TensorConfig,
    TensorMetadata,
)
from service.api.dialects.v2.tensors import IMAGE
from service.api.handler import json_response
from service.api.metrics import LAST_REQUEST, REQUEST_SECONDS, STAGE_SECONDS
from service.api.openapi import KEYED, MODEL, OPEN, responses
from service.api.plan import find_model
from service.api.readiness import readiness

server = APIRouter(prefix="/v2", tags=["v2"], default_response_class=Response)
models = APIRouter(prefix="/v2/models", tags=["v2"], default_response_class=Response)

_EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
)
_PLATFORM = "heatlens"

_SERVER = responses(ServerMetadata, "Name, version and extensions.", errors=OPEN)
_LIVE = responses(ServerHealth, "The process is alive.", errors=OPEN)
_READY = responses(ServerHealth, "Requests can be answered.", errors=OPEN)
_READY[503] = {**_READY[200], "description": "Requests cannot be answered yet; see `error`."}
_NAMES = responses(ModelNames, "The names of all models.", errors=KEYED)
_METADATA = responses(ModelMetadata, "Inputs and outputs.", errors=MODEL)
_MODEL_READY = responses(ModelHealth, "The model answers requests.", errors=MODEL)
_MODEL_READY[503] = {**_MODEL_READY[200], "description": "It does not yet; see `error`."}
_CONFIG = responses(ModelConfig, "The configuration in Triton's terms.", errors=MODEL)
_ALL = responses(ModelStatisticsList, "Statistics of every model version.", errors=KEYED)
_ONE = responses(ModelStatisticsList, "Statistics of the model version.", errors=MODEL)

_STAGES = {
    "queue": "queue",
    "decode": "compute_input",
    "device": "compute_infer",
    "render": "compute_output",
}
_Totals = Mapping[tuple[str, str, str], float]
"""By model, version and the name of a statistic."""


@server.get("", summary="Server metadata", responses=_SERVER)
async def show_server(request: Request) -> Response:
    """Name, version and the extensions that are offered."""
    version: str = request.app.version
    return json_response(ServerMetadata(name="heatlens", version=version, extensions=_EXTENSIONS))


@server.get("/health/live", summary="Liveness", responses=_LIVE)
async def show_live(service: ServiceDep) -> Response:
    """200 as long as the process is alive."""
    return json_response(_health(service))


@server.get("/health/ready", summary="Readiness", responses=_READY)
async def show_ready(service: ServiceDep) -> Response:
    """200 if requests can be answered, else 503."""
    found = _health(service)
    return json_response(found, status=200 if found.ready else 503)


@models.get("", summary="List the models", responses=_NAMES)
async def list_models(service: ServiceDep) -> Response:
    """The names of all models; `NAME:explain` is the same model, explained."""
    names = dict.fromkeys(info.card.name for info in service.pool.models())
    return json_response(ModelNames(models=tuple(names)))


@models.get("/stats", summary="Statistics of all models", responses=_ALL)
async def show_all_statistics(service: ServiceDep) -> Response:
    """Counts and durations since the service started, of all HTTP processes together."""
    return await _statistics(service, service.pool.models())


@models.get("/{model}/stats", summary="Statistics of a model", responses=_ONE)
@models.get("/{model}/versions/{version}/stats", summary="Statistics of a model", responses=_ONE)
async def show_statistics(service: ServiceDep, model: str, version: str | None = None) -> Response:
    """Counts and durations since the service started; predictions and explanations together."""
    info = _find(service, model, version)
    found = [known for known in service.pool.models() if known.card.name == info.card.name]
    return await _statistics(service, found if version is None else [info])


@models.get("/{model}", summary="Model metadata", responses=_METADATA)
@models.get("/{model}/versions/{version}", summary="Model metadata", responses=_METADATA)
async def show_model(service: ServiceDep, model: str, version: str | None = None) -> Response:
    """Inputs and outputs; of `NAME:explain` those of explanations."""
    info = _find(service, model, version)
    outputs = [
        TensorMetadata(name=name, datatype=kind.datatype, shape=(-1, *kind.sizes(info.card)))
        for name, kind in _kinds(model).items()
    ]
    return json_response(
        ModelMetadata(
            name=model,
            versions=info.card.versions,
            platform=_PLATFORM,
            inputs=(TensorMetadata(name=IMAGE, datatype="BYTES", shape=(-1,)),),
            outputs=tuple(outputs),
        )
    )


@models.get("/{model}/ready", summary="Model readiness", responses=_MODEL_READY)
@models.get("/{model}/versions/{version}/ready", summary="Model readiness", responses=_MODEL_READY)
async def show_model_ready(service: ServiceDep, model: str, version: str | None = None) -> Response:
    """200 if the model answers requests, else 503."""
    card = _find(service, model, version).card
    error = UNSET if card.ready else f"The model is {card.state}."
    health = ModelHealth(name=model, ready=card.ready, error=error)
    return json_response(health, status=200 if card.ready else 503)


@models.get("/{model}/config", summary="Model configuration", responses=_CONFIG)
@models.get("/{model}/versions/{version}/config", summary="Model configuration", responses=_CONFIG)
async def show_config(service: ServiceDep, model: str, version: str | None = None) -> Response:
    """The configuration that load generators read."""
    card = _find(service, model, version).card
    types: dict[Literal["FP32", "BYTES"], str] = {"FP32": "TYPE_FP32", "BYTES": "TYPE_STRING"}
    outputs = [
        TensorConfig(name=name, data_type=types[kind.datatype], dims=kind.sizes(card))
        for name, kind in _kinds(model).items()
    ]
    return json_response(
        ModelConfig(
            name=model,
            platform=_PLATFORM,
            backend=_PLATFORM,
            max_batch_size=service.settings.limits.max_images,
            input=(TensorConfig(name=IMAGE, data_type="TYPE_STRING", dims=()),),
            output=tuple(outputs),
            dynamic_batching=DynamicBatching(
                preferred_batch_size=(card.best_batch,), max_queue_delay_microseconds=0
            ),
        )
    )


def _find(service: Service, model: str, version: str | None) -> ModelInfo:
    """The model version of a path.

    Raises:
        UnknownModel: there is none of that name and version.
        NotReady: nothing is known about it yet.
    """
    name = model.removesuffix(EXPLAIN_SUFFIX)
    reference = name if version is None else f"{name}@{version}"
    return find_model(reference, service.pool.models(), service.settings)


def _kinds(model: str) -> Mapping[str, OutputKind]:
    return EXPLAIN if model.endswith(EXPLAIN_SUFFIX) else PREDICT


def _health(service: Service) -> ServerHealth:
    found = readiness(service.pool, service.settings)
    missing = "; ".join(found.missing) or "Not ready."
    return ServerHealth(live=True, ready=found.ready, error=UNSET if found.ready else missing)


async def _statistics(service: Service, infos: Sequence[ModelInfo]) -> Response:
    """Triton's statistics, from the counters that `/metrics` shows."""
    families = await asyncio.to_thread(lambda: list(service.metrics.collect()))
    counts, seconds, last = _totals(families)
    batches: defaultdict[tuple[str, str], int] = defaultdict(int)
    for device in service.pool.devices():
        for count in device.batches:
            batches[count.model, count.version] += count.batches
    found = []
    for card in (info.card for info in infos):
        stats = {
            name: StatisticDuration(
                count=round(counts[*card.key, name]), ns=round(1e9 * seconds[*card.key, name])
            )
            for name in InferStatistics.__struct_fields__
        }
        found.append(
            ModelStatistics(
                name=card.name,
                version=card.version,
                last_inference=round(1000 * last[*card.key, ""]),
                inference_count=stats["compute_infer"].count,
                execution_count=batches[card.key],
                inference_stats=InferStatistics(**stats),
            )
        )
    return json_response(ModelStatisticsList(model_stats=tuple(found)))


def _totals(families: Iterable[Metric]) -> tuple[_Totals, _Totals, _Totals]:
    """How often and for how many seconds in all, and when each model version last answered."""
    counts, seconds, last = (defaultdict[tuple[str, str, str], float](float) for _ in range(3))
    for sample in (sample for family in families for sample in family.samples):
        name, _, part = sample.name.rpartition("_")
        labels = sample.labels
        if sample.name == LAST_REQUEST:
            last[labels["model"], labels["version"], ""] = sample.value
        elif part in ("sum", "count") and name in (REQUEST_SECONDS, STAGE_SECONDS):
            ended = "success" if labels.get("code") == "ok" else "fail"
            statistic = ended if name == REQUEST_SECONDS else _STAGES[labels["stage"]]
            totals = counts if part == "count" else seconds
            totals[labels["model"], labels["version"], statistic] += sample.value
    return counts, seconds, last
