"""The soak's ledger, mixture and slopes, and its clients against a server that misbehaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

import pytest

from benchmarks.resources import Process, Sample, slope, slope_per_10k
from benchmarks.soak import _COUNTED
from benchmarks.soak_client import Ledger, Soaker
from benchmarks.soak_requests import Kind, Leaving, draw, mixture
from service.cli.bench.client import Response
from service.cli.bench.requests import Request
from tests.waiting import eventually

TYPED = {"error": "-", "code": "overloaded", "request_id": "r", "retryable": True}


def kind(*statuses: int, leaving: Leaving = Leaving.STAYS) -> Kind:
    request = Request(path="/v1/explain", body=b"an image")
    return Kind("explain", 1.0, request, frozenset(statuses), leaving)


def answer(status: int, body: object = None, *, request_id: str = "id") -> Response:
    content = b"<html>" if body is None else json.dumps(body).encode()
    return Response(status=status, headers={"x-request-id": request_id}, body=content)


# ---------------------------------------------------------------- ledger


def test_answers_and_typed_errors_balance() -> None:
    ledger = Ledger(sent=3, gone=1)
    ledger.enter(kind(200, 429), answer(200), "id")
    assert not ledger.balances  # one is still missing
    ledger.enter(kind(200, 429), answer(429, TYPED), "id")
    assert ledger.balances
    assert ledger.codes == Counter(overloaded=1)


def test_an_error_that_is_not_typed_is_a_lost_request() -> None:
    ledger = Ledger(sent=1)
    ledger.enter(kind(502), answer(502), "id")
    assert ledger.lost == Counter({"explain: status 502 without a typed error": 1})


@pytest.mark.parametrize(
    ("found", "allowed"),
    [
        (answer(502), 502),  # no typed error
        (answer(500, {"error": "-", "code": "internal"}), 500),  # half of one
        (answer(422, TYPED), 400),  # another status than this kind should get
        (answer(200), 400),
        (answer(200, request_id="another"), 200),
    ],
)
def test_what_makes_the_ledger_fail(found: Response, allowed: int) -> None:
    ledger = Ledger(sent=1)
    ledger.enter(kind(allowed), found, "id")
    assert not ledger.balances


def test_counts_of_the_service_leave_out_the_administration() -> None:
    text = "\n".join(
        f'http_request_duration_seconds_count{{method="{method}",route="{route}",status="{status}"}} {n}'
        for method, route, status, n in [
            ("POST", "/v1/predict", 200, "41.0"),
            ("POST", "unmatched", 404, "1e+06"),
            ("POST", "/v2/repository/models/{model}/load", 200, "3.0"),
            ("GET", "/readyz", 200, "9.0"),
        ]
    )
    assert _COUNTED.findall(text) == [("200", "41.0"), ("404", "1e+06")]


# ---------------------------------------------------------------- mixture


def test_the_mixture_is_drawn_by_weight_and_seed() -> None:
    kinds = mixture([b"first" * 10, b"second" * 10])
    drawn = draw(kinds, 5000, seed=1)
    assert drawn == draw(kinds, 5000, seed=1)
    assert drawn != draw(kinds, 5000, seed=2)
    counts = Counter(kind.name for kind in drawn)
    total = sum(kind.weight for kind in kinds)
    for one in kinds:
        assert counts[one.name] / 5000 == pytest.approx(one.weight / total, abs=0.02)
    assert {one.leaving for one in kinds} == set(Leaving)
    good = [one for one in kinds if 200 in one.statuses]
    assert all({429, 503, 504} <= one.statuses for one in good)


# ---------------------------------------------------------------- clients


@pytest.mark.anyio
async def test_clients_enter_every_end() -> None:
    bodies: list[bytes] = []

    async def misbehave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].split("\r\n")[0])
                body = await reader.readexactly(length)
                bodies.append(body)
                request_id = head.partition("x-request-id: ")[2].split("\r\n")[0]
                if request_id == "soak-2":
                    break  # no answer at all
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
                    + f"X-Request-ID: {request_id}\r\n\r\n{{}}".encode()
                )
        except asyncio.IncompleteReadError as error:
            bodies.append(error.partial)
        finally:
            writer.close()

    server = await asyncio.start_server(misbehave, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    kinds = [
        kind(200),
        kind(200, leaving=Leaving.IN_BODY),
        kind(200),
        kind(200),
        kind(200, leaving=Leaving.WAITING),
    ]
    seen: list[int] = []
    soaker = Soaker(url, kinds, end=time.monotonic() + 30, watch=seen.append)
    ledger = await soaker.run(1)
    server.close()
    await eventually(lambda: set(bodies) - {b"", b"an image"})
    assert (ledger.sent, ledger.answered, ledger.gone, ledger.lost.total()) == (5, 2, 2, 1)
    assert not ledger.balances
    assert seen == [1, 2, 3, 4, 5]
    half = next(body for body in bodies if body != b"an image" and body)
    assert b"an image".startswith(half)


@pytest.mark.anyio
async def test_time_ends_a_soak() -> None:
    soaker = Soaker(
        "http://127.0.0.1:80", [kind(200)] * 5, end=time.monotonic() - 1, watch=lambda _: None
    )
    assert (await soaker.run(2)).sent == 0


# ---------------------------------------------------------------- slopes


def test_slopes() -> None:
    assert slope([0, 1, 2, 3, 4], [5, 7, 9, 11, 13]) == pytest.approx(2)
    assert slope([0, 1, 2, 3, 4], [5, 5, 5, 5, 5]) == pytest.approx(0, abs=1e-12)
    assert slope([0, 1], [0, 9]) == 0  # too few to say
    assert slope([3] * 6, [1, 2, 3, 4, 5, 6]) == 0


def test_warming_up_is_no_growth() -> None:
    """Memory that rises in the first third and then by 3 MB in 10,000 requests."""
    samples = [
        Sample(done=i * 1000, rss_mb=min(i, 10) * 10 + i * 0.3, files=7, sockets=2)
        for i in range(30)
    ]
    process = Process(pid=1, role="http", samples=samples)
    assert slope_per_10k(process, "rss_mb") == pytest.approx(3, rel=1e-6)
    assert slope_per_10k(process, "files") == pytest.approx(0, abs=1e-9)
