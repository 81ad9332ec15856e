"""The ASGI application: everything is built here and hangs on nothing but its arguments."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from models.imaging.decode import DecodeLimits
from service import errors, openapi
from service.cores import available_cores
from service.dependencies import Service
from service.inputs import InputReader
from service.metrics import Metrics
from service.middleware import RequestContext
from service.pipeline import Pipeline
from service.routes import explain, features, health, models, predict
from service.security import require_api_key
from service.settings import Settings
from service.workers.pool import DevicePool

if TYPE_CHECKING:
    from service.fetch import UrlFetcher

_DESCRIPTION = "Classifies images and shows why: predictions, heatmaps, statistics of feature maps."
_EXPOSED = [
    "X-Request-ID",
    "Server-Timing",
    "Retry-After",
    "X-Class-Id",
    "X-Label",
    "X-Probability",
]


def create_app(settings: Settings, pool: DevicePool) -> FastAPI:
    """Build the application; its lifespan starts and closes `pool`, and may be entered again after it ended.

    Args:
        settings: the configuration.
        pool: the devices, not yet started.
    """
    metrics = Metrics(pool, ready_within_s=settings.server.ready_within_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            threads = ThreadPoolExecutor(max(2, available_cores()), "pictures")
            stack.callback(threads.shutdown, wait=False, cancel_futures=True)
            fetcher = _fetcher(settings)
            if fetcher is not None:
                stack.push_async_callback(fetcher.close)
            stack.push_async_callback(pool.close)
            await pool.start()
            app.state.service = _service(
                settings, pool=pool, threads=threads, fetcher=fetcher, metrics=metrics
            )
            yield

    app = FastAPI(
        title="Heatlens",
        description=_DESCRIPTION,
        version=version("heatlens"),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    errors.install(app)
    openapi.install(app)
    _add_middleware(app, settings, metrics)
    _add_routes(app)
    return app


def _fetcher(settings: Settings) -> UrlFetcher | None:
    hosts = settings.security.allowed_url_hosts
    if not hosts:
        return None
    from service.fetch import UrlFetcher  # an HTTP client costs memory: only where needed

    return UrlFetcher(hosts)


def _service(
    settings: Settings,
    *,
    pool: DevicePool,
    threads: ThreadPoolExecutor,
    fetcher: UrlFetcher | None,
    metrics: Metrics,
) -> Service:
    limits = settings.limits
    caps = DecodeLimits(max_bytes=limits.max_image_bytes, max_pixels=limits.max_pixels)
    return Service(
        settings=settings,
        pool=pool,
        reader=InputReader(limits, threads=threads, fetcher=fetcher),
        pipeline=Pipeline(pool, limits=caps, threads=threads),
        metrics=metrics,
    )


def _add_middleware(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    origins = settings.security.cors_origins
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(RequestContext, metrics=metrics)  # last added = outermost


def _add_routes(app: FastAPI) -> None:
    for module in (predict, explain, features, models):
        app.include_router(module.router, dependencies=[Depends(require_api_key)])
    app.include_router(health.router)
