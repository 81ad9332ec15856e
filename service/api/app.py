"""The ASGI application, built from the settings and a pool, without global state."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from models.imaging.decode import DecodeLimits
from service.api import errors, openapi
from service.api.admission import Admission
from service.api.body import BodyReader
from service.api.decoders import Decoders
from service.api.dependencies import Service
from service.api.dialects import kserve_v1, sagemaker, torchserve
from service.api.dialects.v2 import infer, metadata
from service.api.dialects.v2 import schemas as v2
from service.api.door import Door
from service.api.key_counts import KeyCounts
from service.api.metrics import Metrics
from service.api.middleware import RequestContext, RouteAliases
from service.api.pipeline import Pipeline
from service.api.routes import admin, docs, explain, health, images, models, page
from service.api.security import admit, limit_key, require_admin_key, require_api_key
from service.devices.pool import DevicePool
from service.hardware import available_cores, lower_thread_priority
from service.settings import Settings
from service.tracing import http_tracing

if TYPE_CHECKING:
    from service.api.fetch import UrlFetcher

_DESCRIPTION = "Classifies images and shows why: predictions, heatmaps, statistics of feature maps."
# The event loop shares the cores with them: it admits, refuses and hands over at once.
_IMAGE_NICENESS = 3
# Requests for images whose errors have the native shape.
_UNREAD_PATHS = frozenset(
    route.path for module in (images, explain) for route in module.router.routes
)
_EXPOSED = [
    "X-Request-ID",
    "Server-Timing",
    "Retry-After",
    "traceparent",
    "X-Class-Id",
    "X-Label",
    "X-Probability",
]


def create_app(
    settings: Settings,
    pool: DevicePool,
    *,
    metrics: Metrics | None = None,
    read_settings: Callable[[], Settings] | None = None,
    key_counts: KeyCounts | None = None,
    door: Door | None = None,
) -> FastAPI:
    """Build the application; its lifespan starts and closes `pool`, and may be entered repeatedly.

    Args:
        settings: the configuration.
        pool: the devices, not yet started.
        metrics: the metrics of the process; None makes new ones.
        read_settings: reads the configuration again, for models to be loaded; None = it never
            changes.
        key_counts: those of the process; None makes them for this application alone.
        door: that of the process, which this application opens; None = it has none.
    """
    metrics = metrics or Metrics(pool)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            threads = ThreadPoolExecutor(
                _image_threads(), "images", lower_thread_priority, (_IMAGE_NICENESS,)
            )
            stack.callback(threads.shutdown, wait=False, cancel_futures=True)
            # Bodies are read while images are decoded and drawn.
            parsers = ThreadPoolExecutor(2, "bodies")
            stack.callback(parsers.shutdown, wait=False, cancel_futures=True)
            decoders = _decoders(settings)
            stack.callback(decoders.close)
            fetcher = _fetcher(settings)
            if fetcher is not None:
                stack.push_async_callback(fetcher.close)
            app.state.tracing = tracing = http_tracing(settings.tracing)
            if tracing is not None:
                stack.callback(tracing.close)
            stack.push_async_callback(pool.close)
            await pool.start()
            admission = Admission(
                pool,
                max_wait_s=settings.limits.max_wait_s,
                max_answer_bytes=settings.limits.max_answer_bytes,
                key_counts=key_counts,
            )
            app.state.service = service = Service(
                settings=settings,
                read_settings=read_settings or (lambda: settings),
                pool=pool,
                reader=BodyReader(settings.limits, threads=parsers, fetcher=fetcher),
                pipeline=_pipeline(settings, pool, admission, threads, decoders),
                metrics=metrics,
                admission=admission,
            )
            # With tracing every request has a span.
            if door is not None and tracing is None:
                door.open(service, paths=_UNREAD_PATHS)
            yield

    app = FastAPI(
        title="Heatlens",
        description=_DESCRIPTION,
        version=version("heatlens"),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    errors.install(app)
    described = (*v2.RESPONSES, *torchserve.RESPONSES)
    openapi.install(app, requests=v2.REQUESTS, responses=described)
    if settings.security.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.security.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    # Outermost is what is added last.
    app.add_middleware(RequestContext, metrics=metrics)
    if settings.server.aliases:
        app.add_middleware(RouteAliases, aliases=settings.server.aliases)
    _add_routes(app, settings)
    return app


def _fetcher(settings: Settings) -> UrlFetcher | None:
    hosts = settings.security.allowed_url_hosts
    if not hosts:
        return None
    # Imported only where needed: an HTTP client costs memory.
    from service.api.fetch import UrlFetcher

    return UrlFetcher(hosts, allow_http=settings.security.allow_http_urls)


def _decoders(settings: Settings) -> Decoders:
    limits = settings.limits
    return Decoders(
        count=limits.decoders,
        memory_bytes=limits.max_decode_mb * 1_000_000,
        cpu_s=limits.max_decode_s,
    )


def _pipeline(
    settings: Settings,
    pool: DevicePool,
    admission: Admission,
    threads: ThreadPoolExecutor,
    decoders: Decoders,
) -> Pipeline:
    limits = settings.limits
    caps = DecodeLimits(max_bytes=limits.max_image_bytes, max_pixels=limits.max_pixels)
    return Pipeline(
        pool,
        admission=admission,
        limits=caps,
        threads=threads,
        decoders=decoders,
        max_pixels=limits.max_request_pixels,
    )


def _image_threads() -> int:
    return max(2, available_cores())


def _add_routes(app: FastAPI, settings: Settings) -> None:
    keyed = [Depends(require_api_key)]
    is_limited = settings.limits.max_concurrent_per_key is not None
    limited = [Depends(limit_key), Depends(admit)] if is_limited else [Depends(admit)]
    for module in (explain, images, infer, kserve_v1, torchserve, sagemaker):
        app.include_router(module.router, dependencies=limited)
    for router in (models.router, metadata.models):
        app.include_router(router, dependencies=keyed)
    app.include_router(admin.router, dependencies=[Depends(require_admin_key)])
    app.include_router(health.router)
    app.include_router(docs.router)
    app.include_router(metadata.server)
    app.include_router(page.router)
    app.include_router(torchserve.health)
