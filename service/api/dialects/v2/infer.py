"""`/v2/models/{model}/infer` and `/explain`."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response

from service.api import handler
from service.api.compression import compressed
from service.api.dependencies import Service, ServiceDep
from service.api.dialects.v2.inference import BINARY_LENGTH, read_call, respond
from service.api.dialects.v2.schemas import InferResponse
from service.api.openapi import BINARY, INPUT, infer_input, responses

router = APIRouter(prefix="/v2/models/{model}", tags=["v2"], default_response_class=Response)

_RESPONSES = responses(InferResponse, "The requested outputs.", errors=INPUT)
_RESPONSES[200]["content"]["application/octet-stream"] = {"schema": BINARY}


@router.post("/infer", summary="Classify", responses=_RESPONSES, openapi_extra=infer_input())
@router.post(
    "/versions/{version}/infer",
    summary="Classify",
    responses=_RESPONSES,
    openapi_extra=infer_input(),
)
async def infer(
    request: Request, service: ServiceDep, model: str, version: str | None = None
) -> Response:
    """Scores, probabilities and labels of each image.

    With the model `NAME:explain`, or the parameter `explain`, the same as `/explain`.
    """
    return await _respond(request, service, model, version, explains=False)


@router.post(
    "/explain", summary="Classify and explain", responses=_RESPONSES, openapi_extra=infer_input()
)
@router.post(
    "/versions/{version}/explain",
    summary="Classify and explain",
    responses=_RESPONSES,
    openapi_extra=infer_input(),
)
async def explain(
    request: Request, service: ServiceDep, model: str, version: str | None = None
) -> Response:
    """The same, with the heatmap and the overlay of each image."""
    return await _respond(request, service, model, version, explains=True)


async def _respond(
    request: Request, service: Service, model: str, version: str | None, *, explains: bool
) -> Response:
    started = time.monotonic()
    body = await handler.in_time(service, service.reader.read_bytes(request))
    call = await asyncio.to_thread(
        read_call,
        body,
        json_bytes=request.headers.get(BINARY_LENGTH),
        model=model,
        version=version,
        explains=explains,
        limits=service.settings.limits,
    )
    plan, reply = await handler.run_body(
        request, service, call.body, started=started, adapt=call.adapt
    )
    response = await asyncio.to_thread(respond, call, plan, reply)
    return await compressed(response, accept_encoding=request.headers.get("accept-encoding", ""))
