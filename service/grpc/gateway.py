"""Calls the HTTP application in this process, so that gRPC shares its keys, limits and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from msgspec import Struct
from starlette.types import ASGIApp, Message

Headers = Sequence[tuple[str, str]]


class Answer(Struct, frozen=True):
    """A response of the application."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Gateway:
    """Sends requests to an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def call(
        self, method: str, path: str, *, headers: Headers = (), body: bytes = b""
    ) -> Answer:
        """Send one request; cancelling this cancels its work."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        status, found = 500, dict[str, str]()
        parts: list[bytes] = []

        async def receive() -> Message:
            if messages:
                return messages.pop()
            # The client leaves by cancelling.
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status, found
            if message["type"] == "http.response.start":
                status = message["status"]
                found = {k.decode("latin-1"): v.decode("latin-1") for k, v in message["headers"]}
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._app(_scope(method, path, headers), receive, send)
        return Answer(status=status, headers=found, body=b"".join(parts))


def _scope(method: str, path: str, headers: Headers) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "2",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path).encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (k.lower().encode("latin-1"), v.encode("latin-1", "replace")) for k, v in headers
        ],
        "client": None,
        "server": None,
        "state": {},
    }
