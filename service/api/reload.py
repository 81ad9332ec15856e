"""Reloads the configuration while an HTTP process serves, by swapping in a new application.

SIGHUP reaches one HTTP process. It loads new and changed models, publishes the settings and unloads
removed models at the end; every HTTP process swaps in an application built from the published
settings. Requests finish in the application that accepted them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from models.catalog import ModelSpec
from models.errors import HeatlensError
from service.configuration import ConfigurationError, reloaded
from service.devices.pool import DevicePool
from service.devices.runtime_dir import RuntimeDir, SettingsLease
from service.devices.socket_pool import SocketPool
from service.logs import configure_logging
from service.settings import Settings

MakeApp = Callable[[Settings, DevicePool], ASGIApp]
"""Makes an ASGI application whose lifespan starts and closes the pool."""

log = logging.getLogger("heatlens.reload")

_WATCH_S = 0.05
_SETTLE_S = 300.0
_POLL_S = 0.02
_RELEASE_S = 5.0


class _BorrowedPool:
    """A pool that outlives the application using it: it is neither started nor closed again."""

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


class _Generation:
    """An application with the lease of its settings and the count of its requests."""

    def __init__(self, app: ASGIApp, lease: SettingsLease) -> None:
        config = uvicorn.Config(app, lifespan="on", log_config=None, proxy_headers=False)
        config.load()
        self.lease = lease
        self._app = app
        self._lifespan = config.lifespan_class(config)
        self._requests = 0

    async def start(self) -> None:
        """Run the application's startup; raises `RuntimeError` if it fails (uvicorn logs why)."""
        await self._lifespan.startup()
        if self._lifespan.should_exit:
            raise RuntimeError("the application did not start")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests -= 1

    async def finish(self) -> None:
        """Wait for the requests, which end by their deadlines, and run the shutdown."""
        await _wait_until(lambda: not self._requests)
        await self.stop()

    async def stop(self) -> None:
        """Run the application's shutdown now."""
        await self._lifespan.shutdown()


class Reload:
    """The ASGI application of an HTTP process; always serves with the published settings."""

    def __init__(self, runtime: RuntimeDir, make_app: MakeApp) -> None:
        self.pool = SocketPool(runtime)
        self._runtime = runtime
        self._make_app = make_app
        self._tasks: set[asyncio.Task[None]] = set()
        self._current: _Generation | None = None
        self._leading = False
        self._requested = False

    @property
    def started(self) -> bool:
        """Whether the process has built its first application."""
        return self._current is not None

    @property
    def settings(self) -> Settings:
        """The settings in force in this process."""
        return self._serving.lease.settings

    @property
    def _serving(self) -> _Generation:
        assert self._current is not None, "the lifespan has not started"
        return self._current

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the lifespan of the process."""
        if scope["type"] == "lifespan":
            await self._run(receive, send)
        else:
            await self._serving(scope, receive, send)

    def request(self) -> None:
        """Reload the configuration of all HTTP processes, after any reload in progress."""
        self._requested = True
        if self.started and not self._leading:
            self._leading = True
            self._spawn(self._lead())

    async def _run(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.pool.start()
            self._current = await self._build()
        except Exception:
            log.exception("the HTTP process cannot start")
            await send({"type": "lifespan.startup.failed"})
            return
        self._spawn(self._watch())
        if self._requested:
            self.request()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for task in tuple(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._serving.stop()
        await self.pool.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _build(self) -> _Generation:
        """Build an application from the published settings and start it."""
        lease = SettingsLease(self._runtime)
        try:
            app = self._make_app(lease.settings, cast("DevicePool", _BorrowedPool(self.pool)))
            generation = _Generation(app, lease)
            await generation.start()
        except BaseException:
            lease.close()
            raise
        configure_logging(lease.settings.server.log_level)
        self.pool.ready_within_s = lease.settings.server.ready_within_s
        return generation

    async def _swap(self) -> _Generation:
        """Serve with the published settings from now on; returns the replaced application."""
        replaced, self._current = self._serving, await self._build()
        return replaced

    async def _watch(self) -> None:
        """Swap whenever another process publishes settings."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if self._leading or self._serving.lease.is_current():
                continue
            try:
                replaced = await self._swap()
            except Exception:
                log.exception("this process keeps the old configuration")
                continue
            self._spawn(self._retire(replaced))

    async def _retire(self, replaced: _Generation) -> None:
        await replaced.finish()
        replaced.lease.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lead(self) -> None:
        try:
            while self._requested:
                self._requested = False
                await self._reload()
        finally:
            self._leading = False

    async def _reload(self) -> None:
        """Load, swap, unload. A failed step ends the reload and the old configuration stays."""
        try:
            read = await asyncio.to_thread(self._runtime.read_source().read)
        except ConfigurationError as error:
            log.error("the configuration is wrong, the old one stays: %s", error)  # noqa: TRY400
            return
        settings, late = reloaded(self.settings, read)
        for key in late:
            log.warning("%s has changed: restart the service to apply it", key)
        log.info("reloading the configuration")
        # The devices may still be loading their first models.
        await _wait_until(self._settled, timeout_s=_SETTLE_S)
        if not await self._load_models(settings.models):
            log.error(
                "the configuration is not reloaded, the old one stays: a model failed to load"
            )
            return
        if settings != self.settings and not await self._publish(settings):
            return
        await self._unload_models(settings.models)
        log.info("the configuration is reloaded")

    async def _publish(self, settings: Settings) -> bool:
        """Have all HTTP processes swap; returns once no request uses the old settings."""
        before = self.settings
        self._runtime.write_settings(settings)
        try:
            replaced = await self._swap()
        except Exception:
            log.exception("the configuration is not reloaded, the old one stays")
            self._runtime.write_settings(before)
            return False
        await replaced.finish()
        await _wait_until(
            replaced.lease.is_last, timeout_s=before.limits.max_timeout_s + _RELEASE_S
        )
        replaced.lease.close()
        return True

    def _settled(self) -> bool:
        return all(info.card.state != "loading" for info in self.pool.models())

    async def _load_models(self, wanted: Sequence[ModelSpec]) -> bool:
        """Load new, changed and previously broken models; returns whether all succeeded."""
        ready = {info.card.key for info in self.pool.models() if info.card.ready}
        current = [spec for spec in self._runtime.read_catalog() if spec.key in ready]
        changes = [spec for spec in wanted if spec not in current]
        results = [await _succeeds(self.pool.load(spec), spec, "loaded") for spec in changes]
        return all(results)

    async def _unload_models(self, wanted: Sequence[ModelSpec]) -> None:
        """Unload models that are no longer configured."""
        kept = {spec.key for spec in wanted}
        for spec in self._runtime.read_catalog():
            if spec.key not in kept:
                await _succeeds(self.pool.unload(*spec.key), spec, "unloaded")


async def _wait_until(done: Callable[[], bool], *, timeout_s: float = math.inf) -> None:
    until = time.monotonic() + timeout_s
    while not done() and time.monotonic() < until:  # noqa: ASYNC110 # rare, and without an event
        await asyncio.sleep(_POLL_S)


async def _succeeds(change: Awaitable[None], spec: ModelSpec, done: str) -> bool:
    """Await a change of a model and log its result."""
    try:
        await change
    except HeatlensError as error:
        log.error("model %s was not %s: %s", spec.full_name, done, error.message)  # noqa: TRY400
        return False
    log.info("model %s is %s", spec.full_name, done)
    return True
