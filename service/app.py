"""The ASGI application: everything is built here and hangs on nothing but its arguments."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version

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
    """Build the application; its lifespan starts and closes `pool`.

    Args:
        settings: the configuration.
        pool: the devices, not yet started.
    """
    threads = ThreadPoolExecutor(max(2, available_cores()), thread_name_prefix="pictures")
    fetcher = None
    if settings.security.allowed_url_hosts:
        from service.fetch import UrlFetcher  # an HTTP client costs memory: only where needed

        fetcher = UrlFetcher(settings.security.allowed_url_hosts)
    limits = settings.limits
    service = Service(
        settings=settings,
        pool=pool,
        reader=InputReader(limits, threads=threads, fetcher=fetcher),
        pipeline=Pipeline(
            pool,
            limits=DecodeLimits(max_bytes=limits.max_image_bytes, max_pixels=limits.max_pixels),
            threads=threads,
        ),
        metrics=Metrics(pool, ready_within_s=settings.server.ready_within_s),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.callback(threads.shutdown, wait=False, cancel_futures=True)
            if fetcher is not None:
                stack.push_async_callback(fetcher.close)
            await pool.start()
            stack.push_async_callback(pool.close)
            yield

    app = FastAPI(
        title="Heatlens",
        description=_DESCRIPTION,
        version=version("heatlens"),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    errors.install(app)
    openapi.install(app)
    _add_middleware(app, service)
    _add_routes(app)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    origins = service.settings.security.cors_origins
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(RequestContext, metrics=service.metrics)  # last added = outermost


def _add_routes(app: FastAPI) -> None:
    for module in (predict, explain, features, models):
        app.include_router(module.router, dependencies=[Depends(require_api_key)])
    app.include_router(health.router)
