"""Admission: the wait is learnt, who is refused gets in later, and at the limit bodies are not read."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import Request
from msgspec import structs

from models.errors import Overloaded
from service import logs
from service.api.admission import Admission, Line
from service.api.body import ImageInput
from service.api.options import PredictOptions
from service.api.plan import Plan, make_plan
from service.settings import LimitSettings
from tests.fakes import FakePool, fake_info
from tests.service.api.conftest import Serve
from tests.waiting import eventually

LIMIT_S = 1.0
LARGE = {"content-length": "5000000"}
FORM = {"content-type": "multipart/form-data; boundary=b"}
JSON = {"content-type": "application/json"}
JPEG = {"content-type": "image/jpeg"}


class Service:
    """A line whose requests are answered in order, one every so many seconds, under a clock that jumps."""

    def __init__(self, *, every_s: float) -> None:
        self.now = 0.0
        self.line = Line(max_wait_s=LIMIT_S, clock=lambda: self.now)
        self.every_s = every_s
        self.least_s = 0.0
        self.waits_s: list[float] = []
        self._open: deque[tuple[float, contextlib.ExitStack]] = deque()
        self._next = 0.0

    def arrive(self, *, work_ms: float = 13.0, request_id: str = "") -> float | None:
        """Ask for an answer; returns the seconds after which to try again, None if admitted."""
        logs.request_id.set(request_id)
        try:
            self.line.check(
                self.line.wait_s, patience_s=LIMIT_S * (1.5 if self.line.is_due() else 1)
            )
        except Overloaded as error:
            return error.retry_after_s
        place = contextlib.ExitStack()
        place.enter_context(self.line.place(work_ms))
        self._open.append((self.now, place))
        return None

    def run(self, until: float) -> None:
        """Answer what is in the line until then."""
        while self._open and (due := self._due(self._open[0][0])) <= until:
            self.now = self._next = due
            arrived, place = self._open.popleft()
            self.waits_s.append(self.now - arrived)
            place.close()
        self.now = until

    def _due(self, arrived: float) -> float:
        return max(max(self._next, arrived) + self.every_s, arrived + self.least_s)

    def offer(self, rate: float, seconds: float) -> int:
        """Let requests arrive at a rate; returns how many were refused."""
        begun, refused = self.now, 0
        for number in range(int(rate * seconds)):
            self.run(begun + number / rate)
            refused += self.arrive() is not None
        return refused


@pytest.fixture
def service() -> Service:
    return Service(every_s=0.02)


def test_nothing_is_refused_below_the_capacity(service: Service) -> None:
    assert service.offer(rate=45, seconds=20) == 0


@pytest.mark.parametrize("every_s", [0.002, 0.02, 0.2])
@pytest.mark.parametrize("overload", [1.2, 2.0, 5.0])
def test_answers_above_the_capacity_wait_for_about_the_limit(
    service: Service, every_s: float, overload: float
) -> None:
    service.every_s = every_s
    service.offer(rate=overload / every_s, seconds=25)
    settled = service.waits_s[len(service.waits_s) // 2 :]
    assert max(settled) < 1.3 * LIMIT_S
    assert min(settled) > 0.6 * LIMIT_S, "more could have been admitted"


def test_a_service_that_becomes_slower_admits_less(service: Service) -> None:
    service.offer(rate=100, seconds=10)
    service.every_s = 0.1
    service.offer(rate=100, seconds=20)
    assert service.waits_s[-1] < 1.3 * LIMIT_S


def test_a_crowd_is_not_taken_for_slow_because_its_first_answers_take_a_while(
    service: Service,
) -> None:
    """Decoding, transport and drawing take as long for one as for many."""
    service.least_s = 0.3
    assert service.arrive() is None
    service.run(1.0)
    for _ in range(30):
        service.arrive()
    service.run(service.now + 0.35)
    told = [service.arrive() for _ in range(100)]
    assert told.count(None) > 10
    assert max(wait for wait in told if wait is not None) < 4.0


def test_nobody_is_told_to_wait_for_long_because_the_first_answer_took_long(
    service: Service,
) -> None:
    """A crowd at a service that has just started, and is still slow."""
    service.least_s = 4.0
    for _ in range(60):
        service.arrive()
    service.run(4.01)
    told = [wait for _ in range(30) if (wait := service.arrive()) is not None]
    assert told
    assert max(told) < 10.0


def test_a_lone_request_is_admitted_whatever_was_learnt(service: Service) -> None:
    service.every_s = 60.0
    assert service.arrive() is None
    service.run(100.0)
    service.every_s = 0.02
    for _ in range(200):
        assert service.arrive() is None
        service.run(service.now + 1.0)
    assert sum(service.arrive() is None for _ in range(20)) == 20, "the pace was not learnt anew"


def test_who_waits_as_told_gets_in(service: Service) -> None:
    """A crowd arrives at once: each is told a time of its own, rounded up as the header is."""
    service.offer(rate=45, seconds=5)
    told = sorted(-(-wait // 1) for _ in range(400) if (wait := service.arrive()) is not None)
    assert len(told) > 300
    begun, again = service.now, 0
    for wait_s in told:
        service.run(begun + wait_s)
        again += service.arrive() is not None
    assert again < 0.05 * len(told)
    assert told[-1] < 1.5 * 400 * service.every_s, "nobody waits much longer than it takes"


@pytest.mark.parametrize("clients", [90, 200, 400])
def test_who_comes_as_told_gets_in_though_others_never_stop_asking(
    service: Service, clients: int
) -> None:
    """Clients in a closed loop: who has just been answered asks again and could take every place."""
    asking = [(client / 1000, str(client), 1) for client in range(clients)]
    attempts: list[int] = []
    while asking[0][0] < 60.0:
        at, request_id, attempt = heapq.heappop(asking)
        service.run(max(service.now, at))
        told = service.arrive(request_id=request_id)
        if told is None:
            attempts.append(attempt)
            # It has its answer after about as long as the line is.
            ended = service.now + service.line.wait_s
            heapq.heappush(asking, (ended, f"next {len(attempts)}", 1))
        else:
            heapq.heappush(asking, (service.now + max(1, math.ceil(told)), request_id, attempt + 1))
    settled = attempts[len(attempts) // 3 :]
    assert len(attempts) > 0.9 * 60.0 / service.every_s
    assert max(service.waits_s) < 1.9 * LIMIT_S
    assert sum(attempt > 2 for attempt in settled) < 0.05 * len(settled)


def test_who_comes_too_early_hears_the_rest_of_the_time(service: Service) -> None:
    service.offer(rate=500, seconds=3)
    told = [wait for n in range(50) if (wait := service.arrive(request_id=f"r{n}")) is not None]
    assert len(told) == 50
    service.now += 0.01
    assert service.arrive(request_id="r40") == pytest.approx(told[40] - 0.01)
    after = service.arrive(request_id="another")
    assert after is not None
    assert after < told[-1] + 3 * service.every_s, "its asking puts nobody else off"


def test_a_time_that_was_told_is_forgotten_when_nobody_comes(service: Service) -> None:
    service.offer(rate=500, seconds=3)
    service.run(service.now + 60.0)
    service.offer(rate=45, seconds=1)
    first = next(wait for _ in range(400) if (wait := service.arrive()) is not None)
    assert first < 0.1


def test_what_fails_at_once_teaches_nothing(service: Service) -> None:
    service.offer(rate=100, seconds=5)
    before = service.line.wait_s
    for _ in range(1000):
        with contextlib.suppress(ValueError), service.line.place(13.0):
            raise ValueError
    assert service.line.wait_s == pytest.approx(before)


def plan_of_one_image() -> Plan:
    now = time.monotonic()
    return make_plan(
        [ImageInput()],
        PredictOptions(),
        fake_info(),
        limits=LimitSettings(),
        started=now,
        deadline=now + 60,
    )


def test_who_was_let_in_is_not_refused_for_those_who_came_meanwhile() -> None:
    pool = FakePool()
    admission = Admission(pool, max_wait_s=LIMIT_S)
    head = Request(
        {"type": "http", "method": "POST", "headers": [(b"content-type", b"image/jpeg")]}
    )
    plan = plan_of_one_image()

    def is_admitted(wait_s: float) -> bool:
        pool.statuses = [structs.replace(pool.statuses[0], wait_ms=1000 * wait_s)]
        with contextlib.suppress(Overloaded), admission.place(plan):
            return True
        return False

    def let_in() -> list[bool]:
        admission.check_unread(head)
        return [is_admitted(1.3 * LIMIT_S), is_admitted(1.7 * LIMIT_S)]

    assert contextvars.copy_context().run(let_in) == [True, False]
    assert not is_admitted(1.3 * LIMIT_S), "nobody has looked at its head"


def test_a_form_that_asks_for_nothing_long_has_no_advantage() -> None:
    admission = Admission(FakePool(), max_wait_s=LIMIT_S)
    form = Request(
        {"type": "http", "method": "POST", "headers": [(b"content-type", b"multipart/form-data")]}
    )
    plan = plan_of_one_image()

    def has_room() -> bool:
        admission.check_unread(form)
        try:
            places.enter_context(admission.place(plan))
        except Overloaded:
            return False
        return True

    with contextlib.ExitStack() as places:
        while not admission.is_full:
            assert contextvars.copy_context().run(has_room)
        assert not contextvars.copy_context().run(has_room)


# ---------------------------------------------------------------- before the body


class Unread(httpx.AsyncByteStream):
    """A body that notes whether it was asked for."""

    asked = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.asked = True
        yield b"no image"


@contextlib.asynccontextmanager
async def filled(client: httpx.AsyncClient, pool: FakePool, png: bytes) -> AsyncIterator[None]:
    """As many answers are asked for as are admitted; none of them comes."""
    pool.delay_s = 30.0
    asked: list[asyncio.Task[Any]] = []
    while not any(task.done() for task in asked):
        submitted = len(pool.submitted)
        asked.append(task := asyncio.create_task(client.post("/v1/predict", content=png)))
        await eventually(lambda: task.done() or len(pool.submitted) > submitted)  # noqa: B023
    try:
        yield
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


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
@pytest.mark.anyio
async def test_at_the_limit_bodies_are_not_read(
    serve: Serve, pool: FakePool, png: bytes, path: str, headers: dict[str, str], is_read: bool
) -> None:
    async with serve(limits={"max_wait_s": 0.15}) as client, filled(client, pool, png):
        body = Unread()
        response = await client.post(path, content=body, headers=headers)
        assert body.asked == is_read
        assert (response.status_code == 429) == (not is_read)
        if not is_read:
            assert int(response.headers["retry-after"]) >= 1


@pytest.mark.anyio
async def test_of_many_forms_at_the_limit_few_are_read(
    serve: Serve, pool: FakePool, png: bytes
) -> None:
    async with serve(limits={"max_wait_s": 0.15}) as client, filled(client, pool, png):
        bodies = [Unread() for _ in range(60)]
        for body in bodies:
            response = await client.post("/v1/explain", content=body, headers=FORM)
            assert (response.status_code == 429) == (not body.asked)
        assert 0 < sum(body.asked for body in bodies) < 40


@pytest.mark.anyio
async def test_where_long_jobs_wait_as_well_none_is_read(
    serve: Serve, pool: FakePool, png: bytes
) -> None:
    async with serve(limits={"max_wait_s": 0.15}) as client, filled(client, pool, png):
        pool.statuses = [structs.replace(status, long_wait_ms=9000.0) for status in pool.statuses]
        body = Unread()
        response = await client.post("/v1/explain", content=body, headers=FORM)
        assert (response.status_code, body.asked) == (429, False)


@pytest.mark.anyio
async def test_below_the_limit_and_for_other_routes_the_door_is_open(
    serve: Serve, pool: FakePool, png: bytes, draw: Callable[..., bytes]
) -> None:
    async with serve(limits={"max_wait_s": 0.15}) as client:
        assert (await client.post("/v1/predict", content=png)).status_code == 200
        async with filled(client, pool, png):
            assert (await client.get("/v1/models")).status_code == 200
            assert (await client.get("/readyz")).status_code == 200
        pool.delay_s = 0.0
        assert (await client.post("/v1/predict", content=png)).status_code == 200
