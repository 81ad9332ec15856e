"""Deadlines, and clients that leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from msgspec import structs

from models.errors import ModelReplaced
from models.types import Job
from service.api.app import create_app
from service.settings import Settings
from tests.fakes import FakePool

pytestmark = pytest.mark.anyio


async def test_deadline_of_the_option(
    client: httpx.AsyncClient, pool: FakePool, png: bytes
) -> None:
    pool.delay_s = 30
    started = time.monotonic()
    response = await client.post("/v1/predict", content=png, params={"timeout_s": 0.2})
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - started < 5
    assert pool.cancelled == [pool.submitted[0].id]


async def test_deadline_of_the_header(
    client: httpx.AsyncClient, pool: FakePool, png: bytes
) -> None:
    pool.delay_s = 30
    headers = {"X-Request-Timeout-Ms": "200"}
    response = await client.post("/v1/predict", content=png, headers=headers)
    assert response.json()["code"] == "deadline_exceeded"


@pytest.mark.parametrize("header", ["0", "-5", "soon", "1e3", "9" * 20, ""])
async def test_wrong_header(client: httpx.AsyncClient, png: bytes, header: str) -> None:
    headers = {"X-Request-Timeout-Ms": header}
    body = (await client.post("/v1/predict", content=png, headers=headers)).json()
    assert (body["code"], body["field"]) == ("invalid_option", "X-Request-Timeout-Ms")


@pytest.mark.parametrize(
    ("options", "headers", "seconds"),
    [
        ({}, {}, 30),
        ({"timeout_s": "7"}, {}, 7),
        ({}, {"X-Request-Timeout-Ms": "8000"}, 8),
        ({"timeout_s": "7"}, {"X-Request-Timeout-Ms": "8000"}, 7),
        ({"timeout_s": "1e9"}, {}, 60),
    ],
)
async def test_deadline_of_the_job(
    serve: Callable[..., Any],
    pool: FakePool,
    png: bytes,
    options: dict[str, str],
    headers: dict[str, str],
    seconds: float,
) -> None:
    before = time.monotonic()
    async with serve(limits={"max_timeout_s": 60}) as client:
        await client.post("/v1/predict", content=png, params=options, headers=headers)
    deadline = pool.submissions[0].deadline
    assert before + seconds <= deadline <= time.monotonic() + seconds


async def test_a_body_that_trickles_in_is_cut_off(serve: Callable[..., Any]) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    async with serve(limits={"timeout_s": 0.3}) as client:
        response = await client.post("/v1/predict", content=trickle())
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")


# ---------------------------------------------------------------- disconnects


class Client:
    """An ASGI client that can leave."""

    def __init__(self, body: bytes, *, whole: bool = True) -> None:
        self.messages = [{"type": "http.request", "body": body, "more_body": not whole}]
        self.left = asyncio.Event()
        self.heard: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self.messages:
            return self.messages.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.heard.append(message)

    def scope(self, path: str) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"image/png")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }


@pytest.mark.parametrize("route", ["predict", "explain", "features"])
async def test_leaving_cancels_the_jobs(
    pool: FakePool, png: bytes, caplog: pytest.LogCaptureFixture, route: str
) -> None:
    pool.delay_s = 30
    app = create_app(Settings(), pool)
    async with app.router.lifespan_context(app):
        client = Client(png)
        with caplog.at_level(logging.INFO, logger="heatlens.access"):
            answering = asyncio.create_task(
                app(client.scope(f"/v1/{route}"), client.receive, client.send)
            )
            await asyncio.wait_for(pool.arrived.wait(), 5)
            client.left.set()
            await asyncio.wait_for(answering, 5)
        assert pool.cancelled == [pool.submitted[0].id]
        assert b"heatlens_cancelled_total 1.0" in app.state.service.metrics.exposition()
        assert b"heatlens_inflight 0.0" in app.state.service.metrics.exposition()
    (record,) = caplog.records
    assert record.fields["status"] == 499
    assert record.fields["code"] == "cancelled"


async def test_leaving_while_sending(
    pool: FakePool, png: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(), pool)
    async with app.router.lifespan_context(app):
        client = Client(png, whole=False)
        client.left.set()
        with caplog.at_level(logging.INFO, logger="heatlens.access"):
            await app(client.scope("/v1/predict"), client.receive, client.send)
    assert caplog.records[0].fields["status"] == 499
    assert pool.submitted == []


async def test_an_answer_in_time_leaves_no_task_behind(
    client: httpx.AsyncClient, png: bytes
) -> None:
    before = asyncio.all_tasks()
    assert (await client.post("/v1/explain", content=png)).status_code == 200
    assert asyncio.all_tasks() == before


# ---------------------------------------------------------------- models that are replaced


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/explain", "/v1/features"])
async def test_a_request_whose_model_was_replaced_is_asked_again(
    client: httpx.AsyncClient, pool: FakePool, png: bytes, path: str
) -> None:
    """Options are resolved anew, against the labels of the model that responses."""
    (old,) = pool.infos
    new = structs.replace(old, labels=("a", "b", "c", "d", "e"), fingerprint="new")
    pool.infos = [structs.replace(old, fingerprint="old")]

    def replaced(job: Job) -> ModelReplaced | None:
        (submission,) = (s for s in pool.submissions if s.job is job)
        if submission.fingerprint == "new":
            return None
        pool.infos = [new]
        return ModelReplaced("It was replaced.")

    pool.fault = replaced
    response = await client.post(path, files=[("image", png)] * 2)
    assert response.status_code == 200
    labels = {item["label"] for r in response.json()["results"] for item in r["predictions"]}
    assert labels <= set(new.labels)
    assert [s.fingerprint for s in pool.submissions] == ["old", "old", "new", "new"]


async def test_a_model_that_is_replaced_over_and_over_is_a_typed_error(
    client: httpx.AsyncClient, pool: FakePool, png: bytes
) -> None:
    pool.fault = lambda job: ModelReplaced("It was replaced.")
    response = await client.post("/v1/predict", content=png)
    assert (response.status_code, response.json()["code"]) == (503, "model_replaced")
    assert response.json()["retryable"] is True
    assert len(pool.submitted) == 4
