"""KServe's protocol v1, which Vertex AI and TensorFlow Serving share: `:predict` and `:explain`."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from service.api.dependencies import Service, ServiceDep
from service.api.handler import json_response, run_body
from service.api.instances import read_request
from service.api.openapi import INPUT, array_of, instances_input, object_of, responses
from service.api.schemas import ExplainResult, PredictResult, Result

router = APIRouter(prefix="/v1/models", tags=["kserve"], default_response_class=Response)


_PREDICTED = responses(
    object_of(predictions=array_of(PredictResult, ExplainResult)), "Results.", errors=INPUT
)
_EXPLAINED = responses(object_of(explanations=array_of(ExplainResult)), "Results.", errors=INPUT)


@router.post(
    "/{model}:predict",
    summary="Classify instances",
    responses=_PREDICTED,
    openapi_extra=instances_input(),
)
async def predict(model: str, request: Request, service: ServiceDep) -> Response:
    """The result of each instance, as `/v1/predict` has it.

    With `"parameters": {"explain": true}` as `/v1/explain` has it.
    """
    results = await _results(request, service, model, explains=False)
    return json_response({"predictions": results})


@router.post(
    "/{model}:explain",
    summary="Explain instances",
    responses=_EXPLAINED,
    openapi_extra=instances_input(),
)
async def explain(model: str, request: Request, service: ServiceDep) -> Response:
    """The result of each instance, as `/v1/explain` has it."""
    results = await _results(request, service, model, explains=True)
    return json_response({"explanations": results})


async def _results(
    request: Request, service: Service, model: str, *, explains: bool
) -> tuple[Result, ...]:
    started = time.monotonic()
    body = await read_request(request, service, model=model, explains=explains)
    _, reply = await run_body(request, service, body, started=started)
    return reply.results
