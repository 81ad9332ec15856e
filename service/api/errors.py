"""Typed errors on the wire: one shape, one table of statuses, only our own texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

CODES: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        400: ("malformed_body",),
        401: ("unauthorized",),
        403: ("forbidden", "url_input_disabled", "admin_disabled"),
        404: ("unknown_model", "unknown_route", "unknown_label", "unknown_layer"),
        405: ("method_not_allowed",),
        408: ("request_timeout",),
        413: ("body_too_large", "image_too_large", "too_many_images"),
        415: ("unsupported_media_type",),
        422: (
            "invalid_option",
            "image_undecodable",
            "image_too_small",
            "target_out_of_range",
            "method_not_applicable",
            "model_load_failed",
        ),
        429: ("overloaded",),
        431: ("headers_too_large",),
        CLIENT_GONE: ("cancelled",),
        500: ("internal", "input_quarantined"),
        503: ("not_ready", "model_replaced", "draining", "worker_lost"),
        504: ("deadline_exceeded",),
    }
)
"""Error codes by HTTP status."""

STATUS: Mapping[str, int] = MappingProxyType(
    {code: status for status, codes in CODES.items() for code in codes}
)
"""HTTP status by error code."""

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
    headers: dict[str, str] = {}
    if error.retryable:
        headers["Retry-After"] = str(math.ceil(max(_RETRY_AFTER_S, error.retry_after_s or 0.0)))
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        msgspec.json.encode(body), STATUS[error.code], headers, media_type="application/json"
    )


def internal_error() -> InternalError:
    """The public error for a fault of ours; the cause goes to the log."""
    return InternalError("Something went wrong in the service.")


def install(app: FastAPI) -> None:
    """Make every error of the application leave in one shape.

    Unexpected exceptions are handled in the middleware instead, which logs them.
    """
    for kind in (HeatlensError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _respond)


async def _respond(request: Request, exception: Exception) -> Response:
    error = _translate(exception)
    record = record_of(request)
    record.error_code = error.code
    response = error_response(error, request_id=record.request_id)
    if isinstance(exception, HTTPException) and exception.headers:
        response.headers.update(exception.headers)
    return response


def _translate(exception: Exception) -> HeatlensError:
    """The typed error for an exception of a route or of the framework."""
    if isinstance(exception, HeatlensError):
        return exception
    if isinstance(exception, RequestValidationError):
        return InvalidOption("A parameter of the request is missing or wrong.")
    status = exception.status_code if isinstance(exception, HTTPException) else 500
    if status == 404:
        return UnknownRoute("There is no such path.")
    if status == 405:
        return MethodNotAllowed("The path does not answer this HTTP method.")
    return MalformedBody("The request is malformed.") if status < 500 else internal_error()
