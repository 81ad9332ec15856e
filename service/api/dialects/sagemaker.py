"""SageMaker's `/invocations`; its `/ping` is TorchServe's."""

from __future__ import annotations

import time
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response

from service.api.dependencies import ServiceDep
from service.api.handler import images_response, run_body
from service.api.instances import read_request
from service.api.openapi import INPUT, image_input, responses
from service.api.options import ExplainOptions
from service.api.schemas import PredictResponse

router = APIRouter(tags=["sagemaker"], default_response_class=Response)

_OPTIONS = "X-Amzn-SageMaker-Custom-Attributes"
_MODEL = "X-Amzn-SageMaker-Target-Model"
_TEXT = {"type": "string"}
_INPUT = image_input(ExplainOptions)
_INPUT["parameters"] += [
    {
        "name": _OPTIONS,
        "in": "header",
        "description": "Options as in a query, such as `explain=true&methods=gradcam`.",
        "schema": _TEXT,
    },
    {
        "name": _MODEL,
        "in": "header",
        "description": "The model; the default one if absent.",
        "schema": _TEXT,
    },
]


@router.post(
    "/invocations",
    summary="Classify, or explain",
    responses=responses(PredictResponse, "As `/v1/predict` or `/v1/explain`.", errors=INPUT),
    openapi_extra=_INPUT,
)
async def invoke(request: Request, service: ServiceDep) -> Response:
    """The response of `/v1/predict`; with the option `explain=true`, that of `/v1/explain`."""
    started = time.monotonic()
    body = await read_request(
        request,
        service,
        model=request.headers.get(_MODEL),
        more=parse_qsl(request.headers.get(_OPTIONS, "")),
    )
    return images_response(request, *await run_body(request, service, body, started=started))
