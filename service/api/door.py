"""The door: refuses requests for images at the limit by their heads, before the application sees them.

The application refuses them as well (`security.admit`), at a multiple of the cost, which
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

# Refusals of a process take at most about an eighth of a core: those beyond wait their turn, so
# that clients which do not wait as they are told come again less often.
_PER_S = 500.0
_BURST = 100
_LONGEST_DELAY_S = 1.0


class Door:
    """Refuses on behalf of the application that serves.

    What needs more than a look at the head is left to the application: wrong keys, pages of other
    origins, other protocols.
    """

    def __init__(self) -> None:
        self._service: Service | None = None
        self._paths: Collection[str] = ()
        self._next_at = 0.0

    def open(self, service: Service, *, paths: Collection[str]) -> None:
        """Let requests in to another application, whose requests for images have these paths."""
        self._service, self._paths = service, paths

    def refuse(self, scope: Scope) -> tuple[Response, float] | None:
        """The response to a request that is not let in, and the seconds after which it is sent."""
        service = self._service
        if service is None or not service.admission.is_full or scope["path"] not in self._paths:
            return None
        request = Request(scope)
        if "origin" in request.headers or not may_pass(request, service.settings.security):
            return None
        request_id = logs.request_id_of(request.headers.get("x-request-id"))
        token = logs.request_id.set(request_id)
        try:
            service.admission.check_unread(request)
        except Overloaded as error:
            delay_s = self._delay_s()
            return _response(request, error, service.metrics, delay_s=delay_s), delay_s
        finally:
            logs.request_id.reset(token)
        return None

    def _delay_s(self) -> float:
        now = time.monotonic()
        self._next_at = max(self._next_at, now - _BURST / _PER_S) + 1 / _PER_S
        self._next_at = min(self._next_at, now + _LONGEST_DELAY_S)
        return max(0.0, self._next_at - now)


def _response(request: Request, error: Overloaded, metrics: Metrics, *, delay_s: float) -> Response:
    record = RequestRecord(logs.request_id.get(), error_code=error.code)
    response = error_response(error, request_id=record.request_id)
    record.status = response.status_code
    add_headers(response.headers, record, duration_ms=1000 * delay_s)
    route = request.scope["path"]
    finish(request.scope, record, metrics, route=route, duration_ms=1000 * delay_s)
    return response
