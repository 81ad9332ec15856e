"""Clients of an application on a fake pool."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator

import numpy as np
import pytest
from PIL import Image

from heatlens import AsyncClient
from heatlens.asgi import ASGITransport
from service.api.app import create_app
from service.settings import Settings
from tests.fakes import FakePool


@pytest.fixture
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((80, 60))


@pytest.fixture
def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
async def client(pool) -> AsyncIterator[AsyncClient]:
    app = create_app(Settings(), pool)
    transport = ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        AsyncClient("http://service", transport=transport) as client,
    ):
        yield client
