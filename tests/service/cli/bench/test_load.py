"""Closed and open loops against a server that the test slows down, and their summaries."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import pytest

from service.cli.bench.client import Client
from service.cli.bench.load import (
    Bounds,
    Closed,
    Open,
    Run,
    Sample,
    percentile,
    run_load,
    summarise,
)
from service.cli.bench.requests import image_requests

pytestmark = pytest.mark.anyio


def client_of(url: str, *, timeout_s: float = 2.0, check=None) -> Client:
    images = [f"image {i}".encode() for i in range(3)]
    return Client(url, image_requests(images), timeout_s=timeout_s, check=check)


async def measured(url: str, load, *, duration_s: float = 0.3, requests=None, **changes) -> Run:
    bounds = Bounds(warmup_s=0.0, duration_s=duration_s, requests=requests)
    async with client_of(url, **changes) as client:
        return await run_load(client.call, load, bounds)


# ---------------------------------------------------------------- loops


async def test_a_closed_loop_never_has_more_requests_than_clients(serve, respond) -> None:
    under_way = most = 0
    four = asyncio.Barrier(4)

    async def slowly(seen):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await four.wait()
        under_way -= 1
        return respond(b"{}", seen=seen)

    async with serve(slowly) as (server, url):
        run = await measured(url, Closed(clients=4), duration_s=10, requests=40)
    assert most == 4
    assert len(run.samples) == len(server.seen) == 40
    assert all(sample.ok and sample.status == 200 for sample in run.samples)
    assert {seen.body for seen in server.seen} == {b"image 0", b"image 1", b"image 2"}
    assert len({seen.connection for seen in server.seen}) == 4
    assert len({seen.headers["x-request-id"] for seen in server.seen}) == 40
    # The number of requests ended it, not the time.
    assert run.wall_s < 5
    assert run.end == max(sample.ended for sample in run.samples)


async def test_time_ends_a_run_and_responses_in_flight_are_awaited(serve, respond) -> None:
    async def slowly(_seen):
        await asyncio.sleep(0.3)
        return respond(b"{}")

    async with serve(slowly) as (server, url):
        run = await measured(url, Closed(clients=2), duration_s=0.1)
    assert len(server.seen) == 2
    assert [sample.ok for sample in run.samples] == [True, True]
    summary = summarise(run)
    assert summary.seconds == pytest.approx(0.1)
    assert summary.answered == 2
    # No response arrived within the window.
    assert summary.throughput == 0
    assert summary.latency.p50 > 290


async def test_an_open_loop_counts_from_the_due_time(serve, respond) -> None:
    """A stall of 0.4 s delays every request that was due within it."""
    lock = asyncio.Lock()
    stalled = False

    async def one_by_one(_seen):
        nonlocal stalled
        async with lock:
            if not stalled:
                stalled = True
                await asyncio.sleep(0.4)
            return respond(b"{}")

    async with serve(one_by_one) as (_, url):
        run = await measured(url, Open(rate=100, seed=1), duration_s=0.5)
    delayed = [sample for sample in run.samples if sample.latency > 0.1]
    assert len(run.samples) == pytest.approx(50, abs=25)
    # Due within the first 0.3 s of the stall: about 30 of them. A closed loop of one client would
    # show a single one.
    assert len(delayed) >= 15
    begun = min(sample.due for sample in run.samples)
    for sample in delayed[:5]:
        assert sample.latency > 0.4 - (sample.due - begun) - 0.05


async def test_arrivals_are_poisson(serve, respond) -> None:
    async def quickly(_seen):
        return respond(b"{}")

    async with serve(quickly) as (_, url):
        run = await measured(url, Open(rate=400, seed=3), duration_s=1.0)
        again = await measured(url, Open(rate=400, seed=3), duration_s=0.2)
    due = sorted(sample.due for sample in run.samples)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 400, rel=0.2)
    # Arrivals at a fixed interval would have no spread.
    assert spread == pytest.approx(mean, rel=0.25)
    same = sorted(sample.due for sample in again.samples)
    assert [b - a for a, b in itertools.pairwise(same)] == pytest.approx(
        gaps[: len(same) - 1], abs=1e-6
    )


# ---------------------------------------------------------------- failures


async def test_failures_by_code(serve, respond) -> None:
    over = asyncio.Event()

    async def refuse(seen):
        number = len(server.seen)
        if number == 1:
            return respond({"code": "overloaded", "error": "-"}, status=429, seen=seen)
        if number == 2:
            return respond(b"<html>", status=502, seen=seen)
        if number == 3:
            return b""
        if number == 4:
            await over.wait()
        if number == 5:
            return respond(b"{}", headers="X-Request-ID: another\r\n")
        return respond(b"{}", seen=seen)

    async with serve(refuse) as (server, url):
        run = await measured(url, Closed(clients=1), duration_s=20, requests=6, timeout_s=0.3)
        over.set()
    summary = summarise(run)
    assert summary.codes == {
        "overloaded": 1,
        "http_502": 1,
        "connection_lost": 1,
        "client_timeout": 1,
        "foreign_response": 1,
    }
    assert summary.statuses == {"200": 2, "429": 1, "502": 1, "0": 2}
    assert (summary.answered, summary.failed, summary.sent_in_all) == (1, 5, 6)
    assert summary.refused_latency.max > 290


async def test_a_refused_connection_is_not_the_answer_to_another_request(serve, respond) -> None:
    async def refuse(seen):
        number, own = len(server.seen), seen.headers["x-request-id"]
        other = own[:-1] + "9" if number == 1 else "01M8KZ3F28TXNS74CNQGENTR5V"
        body = {"code": "overloaded", "error": "-"}
        return respond(body, status=429, headers=f"X-Request-ID: {other}\r\n")

    async with serve(refuse) as (server, url):
        run = await measured(url, Closed(clients=1), duration_s=20, requests=2)
    assert [sample.code for sample in run.samples] == ["foreign_response", "overloaded"]


async def test_responses_are_checked_on_request(serve, respond) -> None:
    async def swapped(seen):
        number = int(seen.body.split()[1])
        return respond({"image": number if number != 1 else 2})

    def check(image: int, body: bytes) -> bool:
        return json.loads(body)["image"] == image

    async with serve(swapped) as (_, url):
        run = await measured(url, Closed(clients=1), requests=9, duration_s=9, check=check)
    assert [sample.code for sample in run.samples] == ["", "wrong_response", ""] * 3


async def test_a_connection_that_was_idle_for_long_is_not_used(serve, respond, monkeypatch) -> None:
    async def quickly(_seen):
        return respond(b"{}")

    monkeypatch.setattr("service.cli.bench.client.KEEPALIVE_S", 0.02)
    async with serve(quickly) as (server, url), client_of(url) as client:
        for pause in (0.0, 0.05, 0.0):
            await asyncio.sleep(pause)
            assert (await client.call()).ok
    assert [seen.connection for seen in server.seen] == [1, 2, 2]


# ---------------------------------------------------------------- summaries


def sample(due: float, latency: float, *, code: str = "", late: float = 0.0) -> Sample:
    status = 429 if code else 200
    return Sample(
        due=due, sent=due + late, ended=due + latency, status=status, code=code, size=1_000_000
    )


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, p) for p in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 50) == 7
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2
    assert percentile([], 99) == 0


def test_a_summary_is_of_the_window() -> None:
    """A request from before the window counts for throughput only, if it ends within."""
    samples = [
        # Due and ended in the warm-up.
        sample(9.0, 0.5),
        # Ended within the window.
        sample(9.5, 1.0),
        *(sample(10.0 + i / 10, 0.1) for i in range(18)),
        # Ended after the window.
        sample(11.5, 1.0),
        sample(10.2, 0.01, code="overloaded", late=0.004),
    ]
    run = Run(
        load=Open(rate=5.0), samples=samples, start=10.0, end=12.0, client_cpu_s=1.0, wall_s=4.0
    )
    summary = summarise(run)
    assert summary.load == "5.0/s"
    assert (summary.answered, summary.failed, summary.sent_in_all) == (19, 1, 22)
    assert summary.throughput == pytest.approx(19 / 2)
    assert summary.latency.p50 == pytest.approx(100)
    assert summary.latency.max == pytest.approx(1000)
    assert summary.refused_latency.p99 == pytest.approx(10)
    assert summary.lag_ms == pytest.approx(4)
    assert summary.client_cores == pytest.approx(0.25)
    assert summary.megabytes == pytest.approx(1.0)


def test_a_window_without_responses() -> None:
    now = time.monotonic()
    run = Run(load=Closed(clients=1), samples=[], start=now, end=now, client_cpu_s=0, wall_s=0)
    summary = summarise(run)
    assert (summary.latency, summary.throughput, summary.load) == (None, 0, "1 client")
