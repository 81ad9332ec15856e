"""The door: at the limit, requests for images are refused by their heads, as the application would."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from service.api.app import create_app
from service.api.door import Door
from service.logs import JsonFormatter
from service.settings import Settings
from tests.fakes import FakePool
from tests.service.api.test_admission import JPEG, filled

pytestmark = pytest.mark.anyio

Full = Callable[..., contextlib.AbstractAsyncContextManager[tuple[Door, httpx.AsyncClient]]]


@pytest.fixture
def full(pool: FakePool, png: bytes) -> Full:
    """A service at its limit, with its door; and a client that goes past the door."""

    @contextlib.asynccontextmanager
    async def full(**sections: Any) -> AsyncIterator[tuple[Door, httpx.AsyncClient]]:
        door = Door()
        app = create_app(Settings(limits={"max_wait_s": 0.15}, **sections), pool, door=door)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="http://testserver",
                headers={"X-API-Key": "right"},
            ) as client,
            filled(client, pool, png),
        ):
            yield door, client

    return full


def scope_of(path: str = "/v1/explain", **headers: str) -> dict[str, Any]:
    given = {**JPEG, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }


async def test_the_response_is_that_of_the_application(full: Full) -> None:
    async with full() as (door, client):
        refused, delay_s = door.refuse(scope_of(x_request_id="mine-7")) or (None, 0.0)
        inside = await client.post(
            "/v1/explain", content=b"x", headers={**JPEG, "X-Request-ID": "mine-7"}
        )
    assert refused is not None
    assert delay_s == 0
    assert refused.status_code == inside.status_code == 429
    assert refused.body == inside.content
    assert set(refused.headers) == set(inside.headers)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["x-request-id"] == "mine-7"


async def test_it_is_counted_and_logged(full: Full, caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setFormatter(JsonFormatter())
    async with full() as (door, client):
        with caplog.at_level(logging.INFO, logger="heatlens.access"):
            assert door.refuse(scope_of(x_request_id="mine-8")) is not None
        metrics = (await client.get("/metrics")).text
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    (found,) = [line for line in lines if line.get("request_id") == "mine-8"]
    assert (found["route"], found["status"], found["code"]) == ("/v1/explain", 429, "overloaded")
    assert 'route="/v1/explain",status="429"' in metrics
    assert 'heatlens_rejected_total{reason="overloaded"}' in metrics


@pytest.mark.parametrize(
    "scope",
    [
        scope_of("/v1/models"),
        scope_of("/v2/models/efficientnet_lite0/infer"),
        scope_of(origin="http://other.example"),
        scope_of() | {"method": "GET"},
    ],
)
async def test_the_rest_is_left_to_the_application(full: Full, scope: dict[str, Any]) -> None:
    async with full() as (door, _):
        assert door.refuse(scope) is None


async def test_a_wrong_key_is_not_told_that_the_service_is_full(full: Full) -> None:
    digest = "sha256:" + hashlib.sha256(b"right").hexdigest()
    async with full(security={"api_keys": [digest]}) as (door, _):
        assert door.refuse(scope_of()) is None
        assert door.refuse(scope_of(x_api_key="wrong")) is None
        assert door.refuse(scope_of(authorization="Basic right")) is None
        assert door.refuse(scope_of(x_api_key="right")) is not None
        assert door.refuse(scope_of(authorization="Bearer right")) is not None


async def test_below_the_limit_the_door_is_open(pool: FakePool) -> None:
    door = Door()
    assert door.refuse(scope_of()) is None, "there is no application yet"
    app = create_app(Settings(), pool, door=door)
    async with app.router.lifespan_context(app):
        assert door.refuse(scope_of()) is None


async def test_refusals_beyond_a_rate_wait_their_turn(full: Full) -> None:
    """Clients that come again at once are slowed down; a number of them together is not."""
    async with full() as (door, _):
        delays = [refused[1] for _ in range(400) if (refused := door.refuse(scope_of()))]
    assert len(delays) == 400
    assert max(delays[:80]) == 0
    assert 0 < delays[250] < delays[350]
    assert max(delays) <= 1.0


async def test_who_comes_when_told_has_the_right_of_way(full: Full) -> None:
    async with full() as (door, _):
        refused = door.refuse(scope_of(x_request_id="mine-9"))
        assert refused is not None
        assert door.refuse(scope_of(x_request_id="mine-9")), "too early"
        assert door._service is not None
        now = time.monotonic() + float(refused[0].headers["retry-after"])
        door._service.admission._line._clock = lambda: now  # type: ignore[method-assign]
        comes_as_told = door.refuse(scope_of(x_request_id="mine-9"))
        comes_anew = door.refuse(scope_of(x_request_id="other-9"))
    assert comes_as_told is None
    assert comes_anew is not None
