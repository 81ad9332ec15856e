"""A response as a stream of server-sent events: progress, what the maps show so far, the result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from models.errors import Cancelled, HeatlensError
from service.api import handler
from service.api.accept import preferred
from service.api.dependencies import Service
from service.api.errors import error_response, internal_error
from service.api.options import AnyOptions
from service.api.record import record_of
from service.api.schemas import ExplanationResponse, PartialEvent, ProgressEvent
from service.api.watch import PartialMap, Watch

_log = logging.getLogger(__name__)

# Twice a second, so that an event that is late is not later than a second.
_INTERVAL_S = 0.5

MEDIA_TYPE = "text/event-stream"

Draw = Callable[[PartialMap], Awaitable[ExplanationResponse]]


def wanted(accept: str, *, instead_of: Sequence[str] = ()) -> bool:
    """Whether an `Accept` header prefers events to JSON, and to other media types."""
    others = dict.fromkeys(instead_of, False)
    return preferred(accept, {**others, MEDIA_TYPE: True}) or False


async def respond(request: Request, service: Service, options: type[AnyOptions]) -> Response:
    """Read, plan and run a request, and respond with a stream of events; see `stream`."""
    watch = Watch()

    async def answer() -> Response:
        found = await handler.run(request, service, options, watch=watch)
        return handler.images_response(request, *found)

    return await stream(request, answer(), watch=watch, draw=service.pipeline.draw)


async def stream(
    request: Request, answer: Coroutine[Any, Any, Response], *, watch: Watch, draw: Draw
) -> Response:
    """Send the progress of an answer while it is made, and then the answer itself.

    Raises:
        HeatlensError: the answer failed before the stream began, as most bad requests do.
    """
    answering = asyncio.create_task(answer)
    try:
        await asyncio.wait({answering}, timeout=_INTERVAL_S)
    except asyncio.CancelledError:
        answering.cancel()
        raise
    if answering.done():
        answering.result()
    return _EventStream(request, answering, watch=watch, draw=draw)


class _EventStream(EventSourceResponse):
    """Streams until the answer is there; what makes it ends with the stream."""

    def __init__(
        self, request: Request, answering: asyncio.Task[Response], *, watch: Watch, draw: Draw
    ) -> None:
        self._request, self._answering = request, answering
        self._watch, self._draw = watch, draw
        # nginx would collect events in a buffer.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"}
        super().__init__(self._events(), headers=headers)

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        """Stream; that the client has gone is noticed where the answer is made."""
        try:
            await self.stream_response(send)
        finally:
            self._answering.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        before: ProgressEvent | None = None
        while not self._answering.done():
            progress = self._watch.progress()
            if progress == before and progress.what == "queued":
                yield format_sse_event(comment="waiting")
            else:
                yield _event("progress", progress)
            before = progress
            for item in self._watch.take_maps():
                drawn = await self._draw(item)
                yield _event("partial", PartialEvent(image=item.image, explanation=drawn))
            await asyncio.wait({self._answering}, timeout=_INTERVAL_S)
        yield self._last()

    def _last(self) -> bytes:
        """The event that ends the stream.

        Raises:
            ClientDisconnect: there is nobody to send it to.
        """
        record = record_of(self._request)
        try:
            return format_sse_event(event="result", data_str=_text(self._answering.result()))
        except Cancelled:
            raise ClientDisconnect from None
        except HeatlensError as found:
            error = found
        except Exception:  # noqa: BLE001 # the status was sent
            _log.exception("A request failed unexpectedly.")
            error = internal_error()
        record.error_code = error.code
        response = error_response(error, request_id=record.request_id)
        return format_sse_event(event="error", data_str=_text(response))


def _event(name: str, data: ProgressEvent | PartialEvent) -> bytes:
    return format_sse_event(event=name, data_str=msgspec.json.encode(data).decode())


def _text(response: Response) -> str:
    return bytes(response.body).decode()
