"""TorchServe's inference API: `/ping`, `/predictions` and `/explanations`."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from models.errors import HeatlensError
from models.types import Struct
from service.api.dependencies import Service, ServiceDep
from service.api.errors import error_response
from service.api.handler import good_results, json_response, run_body
from service.api.instances import read_request
from service.api.openapi import INPUT, OPEN, image_input, responses
from service.api.options import ExplainOptions, PredictOptions
from service.api.readiness import readiness
from service.api.record import record_of
from service.api.schemas import ExplainResult, Result


class PingResponse(Struct):
    """`Healthy` if requests can be answered."""

    status: str


class TorchServeError(Struct):
    """The reason why a request failed: the status, our code, our text."""

    code: int
    type: str
    message: str


RESPONSES = (PingResponse, TorchServeError)
"""What the OpenAPI document describes."""


class _Route(APIRoute):
    """A route whose errors have TorchServe's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler, and the checks before it."""
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except HeatlensError as error:
                record = record_of(request)
                record.error_code = error.code
                plain = error_response(error, request_id=record.request_id)
                shown = TorchServeError(
                    code=plain.status_code, type=error.code, message=error.message
                )
                response = json_response(shown, status=plain.status_code)
                kept = ("retry-after", "www-authenticate")
                response.headers.update({k: plain.headers[k] for k in kept if k in plain.headers})
                return response

        return handle_errors


health = APIRouter(tags=["torchserve"], default_response_class=Response)
router = APIRouter(tags=["torchserve"], default_response_class=Response, route_class=_Route)

_PING = responses(PingResponse, "Requests can be answered.", errors=OPEN)
_PING[500] = {**_PING[200], "description": "Requests cannot be answered yet, or any more."}
_LABELS = {"type": "object", "additionalProperties": {"type": "number"}}
_PREDICTED = responses(
    {"anyOf": [_LABELS, {"type": "array", "items": _LABELS}]},
    "Probabilities by label; of several images, a list.",
    errors=INPUT,
    error=TorchServeError,
)
_EXPLAINED = responses(
    ExplainResult, "The result; of several images, a list.", errors=INPUT, error=TorchServeError
)


@health.get("/ping", summary="Health for TorchServe and SageMaker", responses=_PING)
async def ping(service: ServiceDep) -> Response:
    """200 if requests can be answered, else 500."""
    ready = readiness(service.pool, service.settings).ready
    status = "Healthy" if ready else "Unhealthy"
    return json_response(PingResponse(status=status), status=200 if ready else 500)


async def predict(
    request: Request, service: ServiceDep, model: str, version: str | None = None
) -> Response:
    """The probabilities of the best classes by label."""
    results = await _results(request, service, model, version, explains=False)
    return _one_or_list([_by_label(result) for result in results])


async def explain(
    request: Request, service: ServiceDep, model: str, version: str | None = None
) -> Response:
    """The result as `/v1/explain` has it."""
    return _one_or_list(await _results(request, service, model, version, explains=True))


def _add_routes() -> None:
    """Add each route by POST, and by PUT, with which curl uploads a file (`-T`)."""
    for path in ("/{model}", "/{model}/{version}"):
        for method in ("POST", "PUT"):
            router.add_api_route(
                f"/predictions{path}",
                predict,
                methods=[method],
                summary="Classify",
                responses=_PREDICTED,
                openapi_extra=image_input(PredictOptions),
            )
            router.add_api_route(
                f"/explanations{path}",
                explain,
                methods=[method],
                summary="Explain",
                responses=_EXPLAINED,
                openapi_extra=image_input(ExplainOptions),
            )


_add_routes()


async def _results(
    request: Request, service: Service, model: str, version: str | None, *, explains: bool
) -> list[Result]:
    """The results of all images.

    Raises:
        HeatlensError: the request or one of its images failed.
    """
    started = time.monotonic()
    reference = model if version is None else f"{model}@{version}"
    body = await read_request(request, service, model=reference, explains=explains)
    _, reply = await run_body(request, service, body, started=started)
    return list(good_results(reply))


def _by_label(result: Result) -> dict[str, float]:
    """Probabilities by label, the best first; of classes of one label, that of the best."""
    found: dict[str, float] = {}
    for prediction in result.predictions or ():
        found.setdefault(prediction.label, prediction.probability)
    return found


def _one_or_list(items: list[Any]) -> Response:
    return json_response(items[0] if len(items) == 1 else items)
