"""`/v2/models/{model}/infer` and `/explain`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api import handler
from service.api.body import BYTES, JSON
from service.api.compression import compressed
from service.api.dependencies import Service, ServiceDep
from service.api.dialects.v2.inference import BINARY_LENGTH, read_call, respond
from service.api.dialects.v2.schemas import InferRequest, InferResponse
from service.api.openapi import BINARY, INPUT, ref_to, responses

router = APIRouter(prefix="/v2/models/{model}", tags=["v2"], default_response_class=Response)

_RESPONSES = responses(InferResponse, "The requested outputs.", errors=INPUT)
_RESPONSES[200]["content"][BYTES] = {"schema": BINARY}
_LENGTH = {
    "name": BINARY_LENGTH,
    "in": "header",
    "description": "Bytes of JSON before binary tensors; 0 if the body is one image.",
    "schema": {"type": "integer", "minimum": 0},
}
_CONTENT = {JSON: {"schema": ref_to(InferRequest.__name__)}, BYTES: {"schema": BINARY}}
_DESCRIBED: dict[str, Any] = {
    "summary": "Classify",
    "responses": _RESPONSES,
    "openapi_extra": {
        "parameters": [_LENGTH],
        "requestBody": {"required": True, "content": _CONTENT},
    },
}
_EXPLAINING = {**_DESCRIBED, "summary": "Classify and explain"}


@router.post("/infer", **_DESCRIBED)
@router.post("/versions/{version}/infer", **_DESCRIBED)
async def infer(
    request: Request, service: ServiceDep, model: str, version: str | None = None
) -> Response:
    """Scores, probabilities and labels of each image.

    With the model `NAME:explain`, or the parameter `explain`, the same as `/explain`.
    """
    return await _respond(request, service, model, version, explains=False)


@router.post("/explain", **_EXPLAINING)
@router.post("/versions/{version}/explain", **_EXPLAINING)
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
