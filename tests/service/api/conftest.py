"""The application on a fake pool, called through ASGI, and drawn images."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.api.app import create_app
from service.settings import Settings
from tests.fakes import FakePool

Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def draw() -> Callable[..., bytes]:
    """Draws and encodes a noisy image of a size, different for each seed."""

    def draw(
        seed: int = 0, *, size: tuple[int, int] = (80, 60), image_format: str = "PNG"
    ) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize(size).save(buffer, image_format)
        return buffer.getvalue()

    return draw


@pytest.fixture
def png(draw: Callable[..., bytes]) -> bytes:
    """One image, 80 by 60."""
    return draw()


@pytest.fixture
def b64(png: bytes) -> str:
    """The image as base64."""
    return base64.b64encode(png).decode()


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def serve(pool: FakePool) -> Serve:
    """Starts an application on `pool` with sections of the settings; yields a client of it."""

    @asynccontextmanager
    async def serve(
        read_settings: Callable[[], Settings] | None = None, **sections: Any
    ) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(Settings(**sections), pool, read_settings=read_settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://testserver") as client,
        ):
            yield client

    return serve


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application with default settings."""
    async with serve() as client:
        yield client
