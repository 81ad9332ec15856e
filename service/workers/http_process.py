"""An HTTP process: uvicorn on the supervisor's listening socket. Never imports torch.

python -m service.workers.http_process --runtime DIR --socket FD --parent PID
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from service.logs import configure_logging
from service.settings import Settings
from service.workers.client import SocketPool
from service.workers.lifeline import die_with_parent
from service.workers.pool import DevicePool
from service.workers.runtime import RuntimeDir

log = logging.getLogger("heatlens.http")

EXIT_NOT_STARTED = 3

Application = Any
"""An ASGI application; its lifespan starts and closes the pool."""

_TYPED_END_S = 1.0


class HttpServer(uvicorn.Server):
    """uvicorn, with our meaning of signals: SIGTERM drains, a second one stops at once, SIGINT is the supervisor's.

    Args:
        config: uvicorn's own.
        pool: what is told to end its jobs with `Draining` shortly before the grace ends, so that even those
            requests get a typed answer.
        grace_s: time that accepted requests have to finish.
    """

    def __init__(self, config: uvicorn.Config, *, pool: SocketPool, grace_s: float) -> None:
        super().__init__(config)
        self._pool = pool
        self._grace_s = grace_s

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
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        refuse_in_s = max(0.0, self._grace_s - _TYPED_END_S)
        asyncio.get_running_loop().call_later(refuse_in_s, self._pool.refuse)


def default_app(settings: Settings, pool: DevicePool) -> Application:
    """The service's application."""
    from service.app import create_app

    return create_app(settings, pool)


def main(
    arguments: Sequence[str] | None = None,
    *,
    make_app: Callable[[Settings, DevicePool], Application] = default_app,
) -> int:
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
    config = uvicorn.Config(
        make_app(settings, pool),
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.server.grace_s)),
    )
    server = HttpServer(config, pool=pool, grace_s=settings.server.grace_s)
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
