"""What is sent and how an answer is read, without any input or output.

`exchange` is a generator: it yields each `Call`, and is sent the answer, or has the error of the
connection thrown into it. A client only does what it says, so that the blocking and the asynchronous
client share every decision.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from heatlens.errors import APIError, ConnectionFailed
from heatlens.images import part_of
from heatlens.results import PartialMap, Progress, decode

if TYPE_CHECKING:
    from heatlens.images import ImageLike

OnProgress = Callable[[Progress], object]
OnPartial = Callable[[PartialMap], object]

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 8.0
_JSON = "application/json"
_EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Call:
    """A request to be sent.

    Attributes:
        files: parts of a form, as (name, (file name, bytes or text, media type)).
        on_progress, on_partial: ask for a stream of events, and receive those of their kind.
        timeout_s: seconds to wait for the service.
        pause_s: seconds to wait before it is sent.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[tuple[str, tuple[str | None, bytes, str]]] = ()
    on_progress: OnProgress | None = None
    on_partial: OnPartial | None = None
    timeout_s: float = 60.0
    pause_s: float = 0.0

    @property
    def has_events(self) -> bool:
        """Whether the answer is a stream of events."""
        return self.on_progress is not None or self.on_partial is not None


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer.

    Attributes:
        status: HTTP status; 0 for an error in a stream that began well.
        retry_after_s: the service's own advice, if it gave one.
    """

    status: int
    body: bytes
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Retries:
    """When to try again: after a broken connection, or an error that says it may pass.

    Every request only computes, so that sending it again does no harm.

    Attributes:
        attempts: calls in all.
        timeout_s: seconds for all of them, and the pauses between them.
    """

    attempts: int = 4
    timeout_s: float = 60.0


Exchange = Generator[Call, Answer, bytes]


def operation(
    name: str,
    images: Iterable[ImageLike],
    options: Mapping[str, Any],
    *,
    on_progress: OnProgress | None = None,
    on_partial: OnPartial | None = None,
) -> Call:
    """The call of `predict`, `explain`, `features` or `compare`."""
    if on_partial is not None:
        options = {**options, "partial_maps": True}
    parts: list[tuple[str, tuple[str | None, bytes, str]]] = [
        ("image", (part.name, part.data, "application/octet-stream"))
        for part in map(part_of, images)
    ]
    parts.append(("options", (None, json.dumps(options).encode(), _JSON)))
    call = Call("POST", f"/v1/{name}", files=parts, on_progress=on_progress, on_partial=on_partial)
    return replace(call, headers={"Accept": _EVENTS if call.has_events else _JSON})


def exchange(call: Call, retries: Retries) -> Exchange:
    """Send a call until it is answered; returns the body of the answer.

    Raises:
        APIError: the service refused the request.
        ConnectionFailed: the service could not be reached.
    """
    until = time.monotonic() + retries.timeout_s
    pause_s = 0.0
    for attempt in range(1, retries.attempts + 1):
        left_s = until - time.monotonic() - pause_s
        advised_s: float | None = None
        error: APIError | ConnectionFailed
        try:
            answer = yield replace(call, timeout_s=max(left_s, 0.001), pause_s=pause_s)
        except ConnectionFailed as failed:
            error = failed
        else:
            if 200 <= answer.status < 400:
                return answer.body
            error, advised_s = _error(answer), answer.retry_after_s
            if not error.retryable:
                raise error
            if error.request_id is not None:
                # By its id the service knows that the request comes again as it was told.
                call = replace(call, headers={**call.headers, "X-Request-ID": error.request_id})
        pause_s = _pause_s(attempt) if advised_s is None else advised_s
        if attempt == retries.attempts or time.monotonic() + pause_s > until:
            raise error
    raise AssertionError


def _pause_s(attempt: int) -> float:
    """Grow exponentially, with jitter, so that clients do not return all at once."""
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (attempt - 1))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 # no secret


def _error(answer: Answer) -> APIError:
    try:
        body = msgspec.json.decode(answer.body)
        return APIError(
            body["error"],
            code=body["code"],
            status=answer.status,
            field=body.get("field"),
            request_id=body.get("request_id"),
            retryable=body["retryable"],
        )
    # A proxy between us and the service answers with a page of its own.
    except (msgspec.DecodeError, KeyError, TypeError):
        return APIError(
            f"The server answered with status {answer.status}.",
            code="unknown",
            status=answer.status,
            retryable=answer.status in (429, 502, 503, 504),
        )


class EventReader:
    """Reads a stream of events, line by line (WHATWG HTML, section 9.2, server-sent events)."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._answer: Answer | None = None
        self._name = "message"
        self._data: list[str] = []

    def feed(self, line: str) -> None:
        """Take one line, without its end."""
        if not line:
            if self._data:
                self._on_event("\n".join(self._data).encode())
            self._name, self._data = "message", []
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._name = value
        elif name == "data":
            self._data.append(value)

    def answer(self) -> Answer:
        """The result, or the error, that ended the stream.

        Raises:
            ConnectionFailed: the stream ended before either.
        """
        if self._answer is None:
            raise ConnectionFailed("The stream ended before the result.")
        return self._answer

    def _on_event(self, data: bytes) -> None:
        if self._name == "progress" and self._call.on_progress is not None:
            self._call.on_progress(decode(data, Progress))
        elif self._name == "partial" and self._call.on_partial is not None:
            self._call.on_partial(decode(data, PartialMap))
        elif self._name == "result":
            self._answer = Answer(status=200, body=data)
        elif self._name == "error":
            self._answer = Answer(status=0, body=data)
