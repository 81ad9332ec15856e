"""Requests of one key at the same time: in one process, and in several that share a folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import httpx
import pytest

from service.api.app import create_app
from service.api.key_counts import KeyCounts
from service.settings import Settings
from tests.fakes import FakePool


def process(folder: Path, pid: int, monkeypatch: pytest.MonkeyPatch) -> KeyCounts:
    """The counts as a process of that id would use it."""
    monkeypatch.setattr(os, "getpid", lambda: pid)
    return KeyCounts(folder)


def fits(counts: KeyCounts, key: str = "a", *, limit: int = 2) -> bool:
    with counts.count(key) as in_flight:
        return in_flight <= limit


def test_one_process() -> None:
    counts = KeyCounts(None)
    with counts.count("a"):
        assert fits(counts)
        with counts.count("a"):
            assert not fits(counts)
            assert not fits(counts)
            assert fits(counts, "b")
        assert fits(counts)
    assert fits(counts)


def test_processes_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = process(tmp_path, 11, monkeypatch)
    second = process(tmp_path, 12, monkeypatch)
    with contextlib.ExitStack() as stack:
        stack.enter_context(first.count("a"))
        assert fits(second)
        stack.enter_context(second.count("a"))
        assert not fits(second)
        assert not fits(first)
        assert fits(first, "b")
    assert fits(first)
    assert fits(second)


def test_a_process_that_has_ended_no_longer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.key_counts._LIST_AGAIN_S", 0)
    first = process(tmp_path, 11, monkeypatch)
    second = process(tmp_path, 12, monkeypatch)
    with first.count("a"):
        assert not fits(second, limit=1)
        (tmp_path / "11").unlink()  # as the supervisor does
        assert fits(second, limit=1)


def test_close_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = process(tmp_path, 11, monkeypatch)
    counts.close()
    assert not list(tmp_path.iterdir())
    assert fits(process(tmp_path, 11, monkeypatch)), "a lifespan may be entered again"


@pytest.mark.anyio
async def test_the_request_over_the_limit_is_told_to_come_again(png_bytes: bytes) -> None:
    import asyncio

    pool = FakePool(delay_s=0.2)
    settings = Settings(limits={"max_concurrent_per_key": 2}, security={"api_keys": ["one", "two"]})
    app = create_app(settings, pool)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://testserver"
        ) as client,
    ):

        async def ask(key: str, path: str = "/v1/predict") -> httpx.Response:
            return await client.post(path, content=png_bytes, headers={"X-API-Key": key})

        responses = await asyncio.gather(*(ask("one") for _ in range(4)), ask("two"))
        assert sorted(response.status_code for response in responses[:4]) == [200, 200, 429, 429]
        assert responses[4].status_code == 200, "another key pays for it"
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.json()["code"] == "overloaded"
        assert int(refused.headers["Retry-After"]) >= 1
        responses = [await ask("one"), await ask("one", "/v1/explain")]
        assert [response.status_code for response in responses] == [200, 200]
        wrong = await ask("three")
        assert wrong.status_code == 401


@pytest.fixture
def png_bytes() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.anyio
async def test_keys_that_are_not_configured_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, png_bytes: bytes
) -> None:
    """The record of counts has room for a few thousand keys: strangers must not fill it."""
    counts = process(tmp_path, 11, monkeypatch)
    pool = FakePool(delay_s=0.05)
    app = create_app(Settings(limits={"max_concurrent_per_key": 2}), pool, key_counts=counts)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://testserver"
        ) as client,
    ):
        for n in range(3):
            headers = {"X-API-Key": f"stranger {n}"}
            assert (await client.post("/v1/predict", content=png_bytes, headers=headers)).is_success
        assert not counts._own


def test_a_count_that_cannot_be_written_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = process(tmp_path, 11, monkeypatch)
    monkeypatch.setattr(counts._record, "_capacity", 1, raising=False)
    with pytest.raises(ValueError), counts.count("a" * 100_000):  # noqa: PT011
        pass
    assert not counts._own
