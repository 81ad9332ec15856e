"""The door: at the limit, a request is refused before its body is read, unless its job may be a long one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from msgspec import structs

from tests.fakes import FakePool
from tests.service.api.conftest import Serve
from tests.waiting import eventually

pytestmark = pytest.mark.anyio

LARGE = {"content-length": "5000000"}
FORM = {"content-type": "multipart/form-data; boundary=b"}
JSON = {"content-type": "application/json"}
JPEG = {"content-type": "image/jpeg"}


class Unread(httpx.AsyncByteStream):
    """A body that notes whether it was asked for."""

    asked = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.asked = True
        yield b"no image"


async def fill(client: httpx.AsyncClient, pool: FakePool, png: bytes) -> list[asyncio.Task[Any]]:
    """Ask for as many answers as are admitted; none of them comes."""
    pool.delay_s = 30.0
    asked = [asyncio.create_task(client.post("/v1/predict", content=png)) for _ in range(40)]
    await eventually(lambda: any(task.done() for task in asked))
    return asked


@pytest.mark.parametrize(
    ("path", "headers", "is_read"),
    [
        ("/v1/predict", JPEG, False),
        ("/v1/explain?top_k=2", JPEG, False),
        ("/v1/explain?methods=rise", JPEG, True),
        ("/v1/explain", FORM, True),
        ("/v1/explain", FORM | LARGE, False),
        ("/v1/explain", JSON, True),
        ("/v1/models/efficientnet_lite0:predict", JSON | LARGE, False),
        ("/v2/models/efficientnet_lite0/infer", JSON, True),
        ("/invocations", JPEG, False),
        ("/predictions/efficientnet_lite0", JPEG, False),
    ],
)
async def test_at_the_limit_bodies_are_not_read(
    serve: Serve, pool: FakePool, png: bytes, path: str, headers: dict[str, str], is_read: bool
) -> None:
    async with serve(limits={"max_wait_s": 0.15}) as client:
        asked = await fill(client, pool, png)
        body = Unread()
        response = await client.post(path, content=body, headers=headers)
        assert body.asked == is_read
        assert (response.status_code == 429) == (not is_read)
        if not is_read:
            assert int(response.headers["retry-after"]) >= 1
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_where_long_jobs_wait_as_well_none_is_read(
    serve: Serve, pool: FakePool, png: bytes
) -> None:
    async with serve(limits={"max_wait_s": 0.15}) as client:
        asked = await fill(client, pool, png)
        pool.statuses = [structs.replace(status, long_wait_ms=9000.0) for status in pool.statuses]
        body = Unread()
        response = await client.post("/v1/explain", content=body, headers=FORM)
        assert (response.status_code, body.asked) == (429, False)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_below_the_limit_and_for_other_routes_the_door_is_open(
    serve: Serve, pool: FakePool, png: bytes, draw: Callable[..., bytes]
) -> None:
    async with serve(limits={"max_wait_s": 0.15}) as client:
        assert (await client.post("/v1/predict", content=png)).status_code == 200
        asked = await fill(client, pool, png)
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        pool.delay_s = 0.0
        assert (await client.post("/v1/predict", content=png)).status_code == 200
