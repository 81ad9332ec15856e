"""`/v2…`: the server, its health, and the models with their inputs, outputs and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from models.types import ModelInfo
from service.api.dependencies import Service, ServiceDep
from service.api.dialects.v2 import schemas
from service.api.dialects.v2.inference import EXPLAIN_SUFFIX
from service.api.dialects.v2.outputs import EXPLAIN, PREDICT, OutputKind
from service.api.dialects.v2.schemas import (
    ModelConfig,
    ModelHealth,
    ModelMetadata,
    ModelNames,
    ServerHealth,
    ServerMetadata,
    TensorConfig,
    TensorMetadata,
)
from service.api.dialects.v2.tensors import IMAGE
from service.api.handler import json_response
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


@models.get("/{model}", summary="Model metadata", responses=_METADATA)
@models.get("/{model}/versions/{version}", summary="Model metadata", responses=_METADATA)
async def show_model(service: ServiceDep, model: str, version: str | None = None) -> Response:
    """Inputs and outputs; of `NAME:explain` those of explanations."""
    info = find(service, model, version)
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
    card = find(service, model, version).card
    error = UNSET if card.ready else f"The model is {card.state}."
    health = ModelHealth(name=model, ready=card.ready, error=error)
    return json_response(health, status=200 if card.ready else 503)


@models.get("/{model}/config", summary="Model configuration", responses=_CONFIG)
@models.get("/{model}/versions/{version}/config", summary="Model configuration", responses=_CONFIG)
async def show_config(service: ServiceDep, model: str, version: str | None = None) -> Response:
    """The configuration that load generators read."""
    card = find(service, model, version).card
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
            dynamic_batching=schemas.DynamicBatching(
                preferred_batch_size=(card.best_batch,), max_queue_delay_microseconds=0
            ),
        )
    )


def find(service: Service, model: str, version: str | None) -> ModelInfo:
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
