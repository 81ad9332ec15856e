"""KServe's protocol v1, which Vertex AI and TensorFlow Serving share: `:predict` and `:explain`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.body import JSON
from service.api.dependencies import Service, ServiceDep
from service.api.handler import json_response, run_body
from service.api.instances import read_request
from service.api.openapi import INPUT, array_of, image_input, object_of, responses
from service.api.options import ExplainOptions
from service.api.schemas import ExplainResult, PredictResult, Result

router = APIRouter(prefix="/v1/models", tags=["kserve"], default_response_class=Response)


def _input() -> dict[str, Any]:
    """The body: instances, or any form of the native API."""
    extra = image_input(ExplainOptions)
    text = {"type": "string", "description": "Base64."}
    held = {"anyOf": [text, {"type": "object", "properties": {"b64": text}, "required": ["b64"]}]}
    holders = dict.fromkeys(("image", "image_bytes", "data"), held)
    instance = {
        "anyOf": [text, {"type": "object", "properties": {"b64": text, **holders, "target": {}}}]
    }
    schema = {
        "type": "object",
        "properties": {
            "instances": {"type": "array", "items": instance, "minItems": 1},
            "parameters": {"type": "object", "description": "Options; `explain`: true or false."},
        },
        "required": ["instances"],
    }
    extra["requestBody"]["content"][JSON] = {"schema": schema}
    return extra


_INPUT = _input()
_PREDICTED = responses(
    object_of(predictions=array_of(PredictResult, ExplainResult)), "Results.", errors=INPUT
)
_EXPLAINED = responses(object_of(explanations=array_of(ExplainResult)), "Results.", errors=INPUT)


@router.post(
    "/{model}:predict",
    summary="Classify instances",
    responses=_PREDICTED,
    openapi_extra=_INPUT,
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
    openapi_extra=_INPUT,
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
