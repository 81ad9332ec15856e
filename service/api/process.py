"""An HTTP process: uvicorn on the supervisor's listening socket. Never imports torch.

python -P -m service.api.process --runtime DIR --socket FD --parent PID
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.heap import end_start, trim_heap
from service.api.connections import Connections
from service.api.http_protocol import Refuse, let_in, protocol
from service.api.reload import MakeApp, Reload
from service.devices.lifeline import die_with_parent
from service.devices.pool import DevicePool
from service.devices.runtime_dir import RuntimeDir
from service.logs import configure_logging
from service.settings import Settings

if TYPE_CHECKING:
    from grpc.aio import Server

log = logging.getLogger("heatlens.http")

EXIT_NOT_STARTED = 3

_TYPED_END_S = 1.0
_LINGER_S = 0.5
_LINGER_POLL_S = 0.02
_RELEASE_INTERVAL_S = 10
_CLOSE_HEADER = (b"connection", b"close")


class ConnectionDraining:
    """ASGI middleware: while `draining` is true, each connection is closed with its next response.

    A client then learns from a response, not from a failed request, that its connection ends.
    """

    def __init__(self, app: Reload) -> None:
        self._app = app
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self.draining:
                message = {**message, "headers": [*message.get("headers", ()), _CLOSE_HEADER]}
            await send(message)

        await self._app(scope, receive, send_last if scope["type"] == "http" else send)


class HttpServer(uvicorn.Server):
    """uvicorn with our handling of signals.

    SIGTERM drains and a second one stops at once; SIGHUP reloads the configuration; SIGINT is left
    to the supervisor. While draining, no new connection is accepted; a kept-alive connection closes
    with its next response, an idle one after half a second; accepted requests finish. Shortly
    before the grace period ends, the pool fails the remaining jobs with `Draining`, so that even
    those requests get a typed error.
    """

    def __init__(
        self, config: uvicorn.Config, *, draining: ConnectionDraining, reload: Reload
    ) -> None:
        super().__init__(config)
        self._draining = draining
        self._reload = reload
        self._leaving: asyncio.Task[None] | None = None
        self._grpc: Server | None = None
        self.servers = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve, over gRPC as well if that has a port."""
        await super().startup(sockets)
        settings = self._reload.settings
        if self.started and settings.server.grpc_port is not None:
            # Imported only where needed: it costs memory.
            from service.grpc.server import start

            self._grpc = await start(self._reload, settings)
        end_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for accepted requests, then close the application."""
        if self._grpc is not None:
            await self._grpc.stop(self._reload.settings.server.grace_s)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        loop.add_signal_handler(signal.SIGHUP, self._reload.request)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    def _drain(self) -> None:
        if self._leaving is not None or not self._reload.started:
            self.should_exit = self.force_exit = True
            return
        self._draining.draining = True
        grace_s = self._reload.settings.server.grace_s
        self.config.timeout_graceful_shutdown = max(1, round(grace_s))
        refuse_in_s = max(0.0, grace_s - _TYPED_END_S)
        asyncio.get_running_loop().call_later(refuse_in_s, self._reload.pool.refuse)
        self._leaving = asyncio.create_task(self._leave(grace_s))

    async def _leave(self, grace_s: float) -> None:
        for server in self.servers:
            server.close()
        if self._grpc is not None:
            # From now on new calls are refused; `shutdown` waits for the others.
            self._refusing = asyncio.create_task(self._grpc.stop(grace_s))
        until = time.monotonic() + min(_LINGER_S, grace_s / 4)
        # uvicorn's set of connections has no event to wait for.
        while self.server_state.connections and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(_LINGER_POLL_S)
        self.should_exit = True


async def _give_memory_back() -> None:
    """Return what large requests have left to the kernel: glibc keeps it for threads that decode."""
    await asyncio.to_thread(trim_heap)


def _default_app(runtime: RuntimeDir) -> tuple[MakeApp, Refuse]:
    """The service's application, and what refuses requests before it sees them."""
    from service.api.app import create_app
    from service.api.door import Door
    from service.api.key_counts import KeyCounts
    from service.api.metrics import Metrics

    source = runtime.read_source()
    key_counts = KeyCounts(runtime.key_counts_dir)
    door = Door()
    metrics: Metrics | None = None

    def make(settings: Settings, pool: DevicePool) -> ASGIApp:
        nonlocal metrics
        # One per process: a second one would overwrite the shared counters of the first.
        metrics = metrics or Metrics(pool)
        return create_app(
            settings,
            pool,
            metrics=metrics,
            read_settings=source.read,
            key_counts=key_counts,
            door=door,
        )

    return make, door.refuse


def main(arguments: Sequence[str] | None = None, *, make_app: MakeApp | None = None) -> int:
    """Serve until SIGTERM; returns the exit code."""
    gc.disable()
    parser = argparse.ArgumentParser(prog="heatlens HTTP process")
    for name, kind in {"runtime": Path, "socket": int, "parent": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    parsed = parser.parse_args(arguments)
    die_with_parent(parsed.parent)
    runtime = RuntimeDir(parsed.runtime)
    configure_logging(runtime.read_settings().server.log_level)
    refuse: Refuse = let_in
    if make_app is None:
        make_app, refuse = _default_app(runtime)
    reload = Reload(runtime, make_app)
    draining = ConnectionDraining(reload)
    connections = Connections(lambda: reload.settings.connections)
    config = uvicorn.Config(
        draining,
        http=protocol(connections, lambda scope: None if draining.draining else refuse(scope)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        callback_notify=_give_memory_back,
        timeout_notify=_RELEASE_INTERVAL_S,
    )
    server = HttpServer(config, draining=draining, reload=reload)
    server.run(sockets=[socket.socket(fileno=parsed.socket)])
    return 0 if server.started else EXIT_NOT_STARTED


if __name__ == "__main__":
    sys.exit(main())
