"""Typed errors on the wire: one shape, one status table, only our own texts."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from models.errors import (
    HeatlensError,
    InternalError,
    InvalidOption,
    MalformedBody,
    MethodNotAllowed,
    UnknownRoute,
)
from service.api.record import record_of
from service.api.schemas import ErrorResponse

CLIENT_GONE = 499
"""Status in logs and metrics of a request that its client abandoned; never sent."""

STATUS: Mapping[str, int] = MappingProxyType(
    {
        "malformed_body": 400,
        "unauthorized": 401,
        "forbidden": 403,
        "url_input_disabled": 403,
        "admin_disabled": 403,
        "unknown_model": 404,
        "unknown_route": 404,
        "unknown_label": 404,
        "unknown_layer": 404,
        "method_not_allowed": 405,
        "body_too_large": 413,
        "image_too_large": 413,
        "too_many_images": 413,
        "unsupported_media_type": 415,
        "invalid_option": 422,
        "image_undecodable": 422,
        "image_too_small": 422,
        "target_out_of_range": 422,
        "method_not_applicable": 422,
        "model_load_failed": 422,
        "overloaded": 429,
        "cancelled": CLIENT_GONE,
        "internal": 500,
        "input_quarantined": 500,
        "not_ready": 503,
        "model_replaced": 503,
        "draining": 503,
        "worker_lost": 503,
        "deadline_exceeded": 504,
    }
)
"""HTTP status by error code."""

CODES: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        status: tuple(code for code, its in STATUS.items() if its == status)
        for status in dict.fromkeys(STATUS.values())
        if status != CLIENT_GONE
    }
)
"""Error codes by the HTTP status that is sent."""

_RETRY_AFTER_S = 1.0


def error_response(error: HeatlensError, *, request_id: str) -> Response:
    """The response that reports an error."""
    body = ErrorResponse(
        error=error.message,
        code=error.code,
        request_id=request_id,
        retryable=error.retryable,
        field=error.field or msgspec.UNSET,
    )
    response = Response(
        msgspec.json.encode(body),
        status_code=STATUS[error.code],
        media_type="application/json",
    )
    if error.retryable:
        seconds = max(_RETRY_AFTER_S, error.retry_after_s or 0.0)
        response.headers["Retry-After"] = str(math.ceil(seconds))
    if error.code == "unauthorized":
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def internal_error() -> InternalError:
    """The public error for a fault of ours; the cause goes to the log."""
    return InternalError("Something went wrong in the service.")


def install(app: FastAPI) -> None:
    """Make every error of the application leave in one shape.

    Unexpected exceptions are not handled here but in the middleware, which logs them.
    """
    app.add_exception_handler(HeatlensError, _handler(_as_is))
    app.add_exception_handler(HTTPException, _handler(_from_http))
    app.add_exception_handler(RequestValidationError, _handler(_from_validation))


def _handler(
    translate: Callable[[Exception], HeatlensError],
) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, exception: Exception) -> Response:
        error = translate(exception)
        record = record_of(request)
        record.error_code = error.code
        response = error_response(error, request_id=record.request_id)
        allow = (getattr(exception, "headers", None) or {}).get("Allow")
        if allow:
            response.headers["Allow"] = allow
        return response

    return handle


def _as_is(exception: Exception) -> HeatlensError:
    return exception if isinstance(exception, HeatlensError) else internal_error()


def _from_http(exception: Exception) -> HeatlensError:
    """Errors of the framework's router."""
    status = getattr(exception, "status_code", 500)
    if status == 404:
        return UnknownRoute("There is no such path.")
    if status == 405:
        return MethodNotAllowed("The path does not answer this HTTP method.")
    return MalformedBody("The request is malformed.") if status < 500 else internal_error()


def _from_validation(_: Exception) -> HeatlensError:
    """Parameters that the framework checked; ours are checked in `service.api.options`."""
    return InvalidOption("A parameter of the request is missing or wrong.")
