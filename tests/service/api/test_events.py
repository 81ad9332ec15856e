"""`POST /v1/explain` as a stream of events, on a fake pool."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from jsonschema_rs import Draft202012Validator

from models.errors import InternalError, Overloaded
from service.api import events
from tests.fakes import FakePool
from tests.service.api.test_openapi import strict

pytestmark = pytest.mark.anyio

STREAM = {"Accept": "text/event-stream"}
RISE = {"methods": "rise", "outputs": "heatmap"}

Draw = Callable[..., bytes]


def read(text: str) -> list[tuple[str, Any]]:
    """The events of a stream in order; comments are left out."""
    found = []
    for block in text.split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines()]
        fields = {name: value for name, _, value in lines if name}
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_INTERVAL_S", 0.02)


async def stream(client: httpx.AsyncClient, png: bytes, **params: Any) -> httpx.Response:
    return await client.post("/v1/explain", content=png, headers=STREAM, params=RISE | params)


async def test_progress_comes_before_the_result(
    client: httpx.AsyncClient, png: bytes, pool: FakePool
) -> None:
    pool.delay_s = 0.2
    response = await stream(client, png)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    *before, (last, result) = read(response.text)
    assert {name for name, _ in before} == {"progress"}
    progress = [data for _, data in before if data["what"] != "queued"]
    assert len(progress) >= 2
    for data in progress:
        assert data["seconds_left"] <= 30.0
        del data["seconds_left"]
        assert data == {"what": "rise", "done": 1000, "total": 4000}
    pool.delay_s = 0.0
    plain = (await client.post("/v1/explain", content=png, params=RISE)).json()
    assert last == "result"
    assert result.keys() == plain.keys()
    assert result["results"] == plain["results"]
    assert result["request_id"] == response.headers["x-request-id"]


async def test_maps_so_far_are_drawn_when_asked_for(
    client: httpx.AsyncClient, draw: Draw, pool: FakePool
) -> None:
    pool.delay_s = 0.2
    files = [("image", draw(0)), ("image", draw(1))]
    response = await client.post(
        "/v1/explain",
        files=files,
        headers=STREAM,
        params=RISE | {"partial_maps": True, "targets": "0,1"},
    )
    found = read(response.text)
    partial = [data for name, data in found if name == "partial"]
    _, result = found[-1]
    # The news of the fake pool show the final maps, once.
    partial.sort(key=lambda p: (p["image"], p["explanation"]["target"]["class_id"]))
    assert [(p["image"], p["explanation"]["target"]["class_id"]) for p in partial] == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    finals = [e for r in result["results"] for e in r["explanations"]]
    assert [p["explanation"] for p in partial] == finals
    progress = [data for name, data in found if name == "progress"]
    document = (await client.get("/openapi.json")).json()
    for name, data in (("ProgressEvent", progress[0]), ("PartialEvent", partial[0])):
        whole = {
            "$ref": f"#/components/schemas/{name}",
            "components": strict(document["components"]),
        }
        Draft202012Validator(whole).validate(data)
    assert (2000, 8000) in {(p["done"], p["total"]) for p in progress}
    quiet = await client.post("/v1/explain", files=files, headers=STREAM, params=RISE)
    assert "partial" not in {name for name, _ in read(quiet.text)}


async def test_a_job_that_waits_is_queued(
    client: httpx.AsyncClient, png: bytes, pool: FakePool
) -> None:
    pool.delay_s = 0.2
    response = await stream(client, png, methods="gradcam")
    queued, *_, (last, _) = read(response.text)
    assert queued == (
        "progress",
        {"what": "queued", "done": 0, "total": 0, "seconds_left": None},
    )
    assert last == "result"
    assert response.text.count(": waiting\n\n") >= 2


async def test_a_quick_answer_is_an_event_all_the_same(
    client: httpx.AsyncClient, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_INTERVAL_S", 5.0)
    response = await stream(client, png, methods="gradcam")
    assert [name for name, _ in read(response.text)] == ["result"]


@pytest.mark.parametrize(
    ("params", "status", "code"),
    [({"methods": "x"}, 422, "invalid_option"), ({"model": "x"}, 404, "unknown_model")],
)
async def test_errors_before_the_stream_are_ordinary(
    client: httpx.AsyncClient, png: bytes, params: dict[str, str], status: int, code: str
) -> None:
    response = await stream(client, png, **params)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/json"
    response = await stream(client, b"no image")
    assert response.status_code == 415


async def test_refusals_of_a_device_are_ordinary(
    client: httpx.AsyncClient, png: bytes, pool: FakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_INTERVAL_S", 5.0)
    pool.fault = lambda job: Overloaded("The service is at its limit.", retry_after_s=3)
    response = await stream(client, png)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


async def test_an_error_within_the_stream_is_its_last_event(
    client: httpx.AsyncClient,
    png: bytes,
    pool: FakePool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool.delay_s = 0.2
    pool.fault = lambda job: InternalError("The model failed on this request.")
    with caplog.at_level(logging.INFO, "heatlens.access"):
        response = await stream(client, png)
    assert response.status_code == 200
    *before, (name, error) = read(response.text)
    assert {kind for kind, _ in before} == {"progress"}
    assert name == "error"
    assert error == {
        "error": "The model failed on this request.",
        "code": "internal",
        "request_id": response.headers["x-request-id"],
        "retryable": False,
    }
    (line,) = [r.fields for r in caplog.records if r.name == "heatlens.access"]
    assert (line["status"], line["code"]) == (200, "internal")


async def test_a_deadline_ends_the_stream(
    client: httpx.AsyncClient, png: bytes, pool: FakePool
) -> None:
    pool.delay_s = 5.0
    response = await stream(client, png, timeout_s=0.1, samples=5)
    name, error = read(response.text)[-1]
    assert (name, error["code"]) == ("error", "deadline_exceeded")
    assert pool.cancelled == [job.id for job in pool.submitted]


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("text/event-stream", "text/event-stream"),
        ("text/event-stream, application/json;q=0.9", "text/event-stream"),
        ("text/event-stream;q=0.5, application/json", "application/json"),
        ("text/event-stream;q=0.5, image/png", "image/png"),
        ("text/*", "application/json"),
    ],
)
async def test_who_prefers_a_stream_gets_one(
    client: httpx.AsyncClient, png: bytes, accept: str, media_type: str
) -> None:
    response = await client.post("/v1/explain", content=png, headers={"Accept": accept})
    assert response.headers["content-type"].partition(";")[0] == media_type
