"""The door: refuses requests for images at the limit by their heads, before the application sees them.

The application refuses them as well (`dependencies.refuse_excess`), at a multiple of the cost, which
clients that come again at once would take from those who wait.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from fastapi import Request, Response
from starlette.types import Scope

from models.errors import Overloaded
from service import logs
from service.api.dependencies import Service
from service.api.errors import error_response
from service.api.metrics import Metrics
from service.api.middleware import add_headers, finish
from service.api.record import RequestRecord
from service.api.security import may_pass


class Door:
    """Refuses on behalf of the application that serves.

    What needs more than a look at the head is left to the application: wrong keys, pages of other
    origins, other protocols.
    """

    def __init__(self) -> None:
        self._service: Service | None = None
        self._paths: Collection[str] = ()

    def open(self, service: Service, *, paths: Collection[str]) -> None:
        """Let requests in to another application, whose requests for images have these paths."""
        self._service, self._paths = service, paths

    def refuse(self, scope: Scope) -> Response | None:
        """The response to a request that is not let in."""
        service = self._service
        if service is None or not service.admission.is_full or scope["path"] not in self._paths:
            return None
        request, started = Request(scope), time.perf_counter()
        if "origin" in request.headers or not may_pass(request, service.settings.security):
            return None
        try:
            service.admission.check_unread(request)
        except Overloaded as error:
            return _respond(request, error, service.metrics, started=started)
        return None


def _respond(request: Request, error: Overloaded, metrics: Metrics, *, started: float) -> Response:
    record = RequestRecord(logs.request_id_of(request.headers.get("x-request-id")))
    record.error_code = error.code
    token = logs.request_id.set(record.request_id)
    response = error_response(error, request_id=record.request_id)
    record.status = response.status_code
    duration_ms = (time.perf_counter() - started) * 1000
    add_headers(response.headers, record, duration_ms=duration_ms)
    path = request.scope["path"]
    finish(request.scope, record, metrics, route=path, duration_ms=duration_ms)
    logs.request_id.reset(token)
    return response
