"""Health and metrics: no key is required."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from msgspec import structs

from service.api import metrics
from service.api.dependencies import ServiceDep
from service.api.handler import json_response
from service.api.openapi import OPEN, TAKES_KEY, responses
from service.api.readiness import readiness
from service.api.schemas import AliveResponse, ReadyResponse
from service.api.security import access_of, require_operator_key

router = APIRouter(tags=["health"], default_response_class=Response)

_ALIVE = responses(AliveResponse, "The process is alive.", errors=OPEN)
_READY = responses(ReadyResponse, "Requests can be answered.", errors=OPEN)
_READY[503] = {**_READY[200], "description": "Requests cannot be answered yet; see `missing`."}
_METRICS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Prometheus's text format.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}


@router.get("/livez", summary="Liveness", responses=_ALIVE)
async def livez(request: Request) -> Response:
    """200 as long as the process is alive."""
    return json_response(AliveResponse(status="alive", version=request.app.version))


@router.get("/readyz", summary="Readiness", responses=_READY)
@router.get("/healthz", summary="Readiness", responses=_READY)
async def readyz(request: Request, service: ServiceDep) -> Response:
    """200 if a device completed a real pass recently and a model is warm, else 503.

    The body lists what is missing. Why a model could not be loaded is told to admins only.
    """
    found = readiness(service.pool, service.settings)
    access = access_of(request, service)
    if access == "none":
        found = ReadyResponse(ready=found.ready, missing=(), devices=(), models=())
    elif access != "admin":
        models = tuple(structs.replace(model, reason=None) for model in found.models)
        found = structs.replace(found, models=models)
    return json_response(found, status=200 if found.ready else 503)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    responses=_METRICS,
    dependencies=[Depends(require_operator_key)],
    openapi_extra=TAKES_KEY,
)
async def show_metrics(service: ServiceDep) -> Response:
    """Metrics of all HTTP processes and devices."""
    return Response(service.metrics.exposition(), headers={"Content-Type": metrics.CONTENT_TYPE})
