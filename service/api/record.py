"""The record of one request, for its access log line, its metrics and its headers."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request
from starlette.types import Scope

from models.types import Operation, Struct
from service.api.schemas import Timings

_KEY = "record"


class Served(Struct):
    """The model that serves a request, and the operation; known once the options are resolved."""

    model: str
    version: str
    operation: Operation


@dataclass(slots=True)
class RequestRecord:
    """Made by the middleware, completed while the request is answered.

    Attributes:
        request_id: the inbound id if it is sane, otherwise a new one.
        status: of the response; None until it starts.
        error_code: code of the error that was sent; empty if there was none.
        served: None for requests that name no model.
        images: number of images sent.
        timings, batch_size: None until all images have a result.
    """

    request_id: str
    status: int | None = None
    error_code: str = ""
    served: Served | None = None
    images: int = 0
    timings: Timings | None = None
    batch_size: int | None = None

    def attach(self, scope: Scope) -> None:
        """Make the record available to everything that handles the request."""
        scope.setdefault("state", {})[_KEY] = self

    def log_fields(self) -> dict[str, object]:
        """Fields of the access log line."""
        fields: dict[str, object] = {"code": self.error_code} if self.error_code else {}
        if self.served is not None:
            fields |= {"model": self.served.model, "images": self.images}
        if self.timings is not None:
            fields |= {"batch_size": self.batch_size, "timings_ms": self.timings}
        return fields


def record_of(request: Request) -> RequestRecord:
    """The record of a request that passed the middleware."""
    record: RequestRecord = request.scope["state"][_KEY]
    return record
