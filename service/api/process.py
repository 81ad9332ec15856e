"""An HTTP process: uvicorn on the supervisor's listening socket. Never imports torch.

python -m service.api.process --runtime DIR --socket FD --parent PID
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import Message, Receive, Scope, Send

from service.devices.pool import DevicePool
from service.devices.runtime_dir import RuntimeDir, die_with_parent
from service.devices.socket_pool import SocketPool
from service.logs import configure_logging
from service.settings import Settings

Application = Any
"""An ASGI application; its lifespan starts and closes the pool."""

MakeApp = Callable[[Settings, DevicePool], Application]

log = logging.getLogger("heatlens.http")

EXIT_NOT_STARTED = 3

_TYPED_END_S = 1.0
_LINGER_S = 0.5
_LINGER_POLL_S = 0.02
_LAST = (b"connection", b"close")


class ConnectionDraining:
    """Wraps an application; while `leaving`, each answer is the last one on its connection.

    A client learns with an answer that its connection ends, rather than by sending a request into
    one that is closed.

    Attributes:
        leaving: whether connections are to end.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self.leaving = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self.leaving:
                message = {**message, "headers": [*message.get("headers", ()), _LAST]}
            await send(message)

        await self._app(scope, receive, send_last if scope["type"] == "http" else send)


class HttpServer(uvicorn.Server):
    """uvicorn, with our meaning of signals: SIGTERM drains, a second one stops at once, SIGINT is the supervisor's.

    Draining: no new connection is accepted here; clients that use theirs get an answer that ends
    it; after half a second idle connections are closed too, and what was accepted is finished.

    Args:
        config: uvicorn's own.
        closing: the application.
        pool: what is told to end its jobs with `Draining` shortly before the grace ends, so that
            even those requests get a typed answer.
        grace_s: time that accepted requests have to finish.
        announce: called once the server accepts connections.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        closing: ConnectionDraining,
        pool: SocketPool,
        grace_s: float,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._closing = closing
        self._pool = pool
        self._grace_s = grace_s
        self._announce = announce
        self._leaving: asyncio.Task[None] | None = None
        self.servers = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections, and say so."""
        await super().startup(sockets)
        if self.started:
            self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM while serving."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    def _drain(self) -> None:
        if self._leaving is not None:
            self.should_exit = self.force_exit = True
            return
        self._closing.leaving = True
        refuse_in_s = max(0.0, self._grace_s - _TYPED_END_S)
        asyncio.get_running_loop().call_later(refuse_in_s, self._pool.refuse)
        self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        for server in self.servers:
            server.close()
        until = time.monotonic() + min(_LINGER_S, self._grace_s / 4)
        while self.server_state.connections and time.monotonic() < until:  # noqa: ASYNC110 # uvicorn's set tells nobody
            await asyncio.sleep(_LINGER_POLL_S)
        self.should_exit = True


def _default_app(runtime: RuntimeDir) -> MakeApp:
    """The service's application."""
    from service.api.app import create_app

    source = runtime.read_source()
    return functools.partial(create_app, read_settings=source.read, limiter_dir=runtime.limiter_dir)


def main(arguments: Sequence[str] | None = None, *, make_app: MakeApp | None = None) -> int:
    """Serve until SIGTERM; returns the exit code."""
    parser = argparse.ArgumentParser(prog="heatlens HTTP process")
    parser.add_argument("--runtime", type=Path, required=True)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parsed = parser.parse_args(arguments)
    die_with_parent(parsed.parent)
    runtime = RuntimeDir(parsed.runtime)
    settings = runtime.read_settings()
    configure_logging(settings.server.log_level)
    pool = SocketPool(runtime, ready_within_s=settings.server.ready_within_s)
    make_app = make_app or _default_app(runtime)
    closing = ConnectionDraining(make_app(settings, pool))
    config = uvicorn.Config(
        closing,
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.server.grace_s)),
    )
    server = HttpServer(
        config,
        closing=closing,
        pool=pool,
        grace_s=settings.server.grace_s,
        announce=runtime.http_file(os.getpid()).touch,
    )
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(server.serve(sockets=[socket.socket(fileno=parsed.socket)]))
    return 0 if server.started else EXIT_NOT_STARTED


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The faster loop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


if __name__ == "__main__":
    sys.exit(main())
