"""Closed and open loops against a server that the test slows down, and the arithmetic of summaries."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import pytest

from service.cli.bench.client import Client, Sample
from service.cli.bench.loops import Bounds, Closed, Open, Run, run_load
from service.cli.bench.requests import picture_requests
from service.cli.bench.summary import percentile, summarise

pytestmark = pytest.mark.anyio


def client_of(address, *, pictures: int = 3, timeout_s: float = 2.0, check=None) -> Client:
    data = [f"picture {i}".encode() for i in range(pictures)]
    return Client(address, picture_requests(address, data), timeout_s=timeout_s, check=check)


async def measured(address, load, *, duration_s: float = 0.3, requests=None, **changes):
    client = client_of(address, **changes)
    bounds = Bounds(warmup_s=0.0, duration_s=duration_s, requests=requests)
    try:
        return await run_load(client, load, bounds)
    finally:
        client.close()


# ---------------------------------------------------------------- loops


async def test_a_closed_loop_never_has_more_requests_than_clients(serve, answer) -> None:
    under_way = most = 0

    async def slowly(seen):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1
        return answer(b"{}", seen=seen)

    async with serve(slowly) as (server, address):
        run = await measured(address, Closed(clients=4), duration_s=10, requests=40)
    assert most == 4
    assert len(run.samples) == len(server.seen) == 40
    assert all(sample.ok and sample.status == 200 for sample in run.samples)
    assert {seen.body for seen in server.seen} == {b"picture 0", b"picture 1", b"picture 2"}
    assert len({seen.connection for seen in server.seen}) == 4
    assert len({seen.headers["x-request-id"] for seen in server.seen}) == 40
    assert run.wall_s < 5  # the number of requests ended it, not the time


async def test_time_ends_a_run_and_answers_under_way_are_awaited(serve, answer) -> None:
    async def slowly(_seen):
        await asyncio.sleep(0.3)
        return answer(b"{}")

    async with serve(slowly) as (server, address):
        run = await measured(address, Closed(clients=2), duration_s=0.1)
    assert len(server.seen) == 2
    assert [sample.ok for sample in run.samples] == [True, True]
    summary = summarise(run)
    assert summary.seconds == pytest.approx(0.1)
    assert summary.answered == 2
    assert summary.throughput == 0  # nothing came within the window
    assert summary.latency.p50 > 290


async def test_an_open_loop_counts_from_the_due_time(serve, answer) -> None:
    """One stall of 0.4 s is felt by every request that was due within it, though the server handles one at a time."""
    lock = asyncio.Lock()
    stalled = False

    async def one_by_one(_seen):
        nonlocal stalled
        async with lock:
            if not stalled:
                stalled = True
                await asyncio.sleep(0.4)
            return answer(b"{}")

    async with serve(one_by_one) as (_, address):
        run = await measured(address, Open(rate=100, seed=1), duration_s=0.5)
    delayed = [sample for sample in run.samples if sample.latency > 0.1]
    assert len(run.samples) == pytest.approx(50, abs=25)
    # Due within the first 0.3 s of the stall: about 30 of them. A closed loop of one client would
    # show a single one.
    assert len(delayed) >= 15
    begun = min(sample.due for sample in run.samples)
    for sample in delayed[:5]:
        assert sample.latency > 0.4 - (sample.due - begun) - 0.05


async def test_arrivals_are_poisson(serve, answer) -> None:
    async def quickly(_seen):
        return answer(b"{}")

    async with serve(quickly) as (_, address):
        run = await measured(address, Open(rate=400, seed=3), duration_s=1.0)
        again = await measured(address, Open(rate=400, seed=3), duration_s=0.2)
    due = sorted(sample.due for sample in run.samples)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 400, rel=0.2)
    assert spread == pytest.approx(mean, rel=0.25)  # a steady beat would have none
    same = sorted(sample.due for sample in again.samples)
    assert [b - a for a, b in itertools.pairwise(same)] == pytest.approx(
        gaps[: len(same) - 1], abs=1e-6
    )


# ---------------------------------------------------------------- what becomes of a request


async def test_failures_by_code(serve, answer) -> None:
    async def refuse(seen):
        number = len(server.seen)
        if number == 1:
            return answer({"code": "overloaded", "error": "-"}, status=429, seen=seen)
        if number == 2:
            return answer(b"<html>", status=502, seen=seen)
        if number == 3:
            return b""
        if number == 4:
            await asyncio.sleep(1)
        if number == 5:
            return answer(b"{}", headers="X-Request-ID: another\r\n")
        return answer(b"{}", seen=seen)

    async with serve(refuse) as (server, address):
        run = await measured(address, Closed(clients=1), duration_s=20, requests=6, timeout_s=0.3)
    summary = summarise(run)
    assert summary.codes == {
        "overloaded": 1,
        "http_502": 1,
        "connection_lost": 1,
        "client_timeout": 1,
        "foreign_answer": 1,
    }
    assert summary.statuses == {"200": 2, "429": 1, "502": 1, "0": 2}
    assert (summary.answered, summary.failed, summary.sent_in_all) == (1, 5, 6)
    assert summary.refused_latency.max > 290


async def test_answers_are_checked_where_told(serve, answer) -> None:
    async def swapped(seen):
        number = int(seen.body.split()[1])
        return answer({"picture": number if number != 1 else 2})

    def check(picture: int, body: bytes) -> bool:
        return json.loads(body)["picture"] == picture

    async with serve(swapped) as (_, address):
        run = await measured(address, Closed(clients=1), requests=9, duration_s=9, check=check)
    assert [sample.code for sample in run.samples] == ["", "wrong_answer", ""] * 3


async def test_a_connection_that_was_idle_too_long_is_not_used(serve, answer, monkeypatch) -> None:
    async def quickly(_seen):
        return answer(b"{}")

    monkeypatch.setattr("service.cli.bench.client._IDLE_S", 0.02)
    async with serve(quickly) as (server, address):
        client = client_of(address)
        for pause in (0.0, 0.05, 0.0):
            await asyncio.sleep(pause)
            assert (await client.call()).ok
        client.close()
    assert [seen.connection for seen in server.seen] == [1, 2, 2]


# ---------------------------------------------------------------- arithmetic


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
    """Due before the window: forgotten, though its answer that came within counts as throughput."""
    samples = [
        sample(9.0, 0.5),  # all of it in the warm-up
        sample(9.5, 1.0),  # answered within the window
        *(sample(10.0 + i / 10, 0.1) for i in range(18)),
        sample(11.5, 1.0),  # answered after it
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


def test_a_window_without_answers() -> None:
    now = time.monotonic()
    run = Run(load=Closed(clients=1), samples=[], start=now, end=now, client_cpu_s=0, wall_s=0)
    summary = summarise(run)
    assert (summary.latency, summary.throughput, summary.load) == (None, 0, "1 client")
