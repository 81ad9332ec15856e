"""The local pool, and with it the compute thread, over the fake engine."""

from __future__ import annotations

import asyncio
import time
import uuid

import pytest
from fake_engine import FakeSuspended, Fault, expected_class, image_of, make_backend, spec
from msgspec import structs

from models.errors import (
    DeadlineExceeded,
    Draining,
    HeatlensError,
    InternalError,
    ModelLoadFailed,
    NotReady,
    Overloaded,
    UnknownModel,
    WorkerLost,
)
from models.types import Job, JobOptions
from service.devices.messages import Completion, Submission
from service.settings import Settings
from service.worker import compute
from service.worker.local import LocalPool
from tests.waiting import eventually

pytestmark = pytest.mark.anyio


def job(
    number: int, fault=Fault.NONE, argument: int = 0, *, model="fake", timeout_s=10.0
) -> Submission:
    job = Job(
        id=uuid.uuid4().hex,
        operation="predict",
        model=model,
        version="1",
        input=image_of(number, fault, argument),
        options=JobOptions(),
    )
    return Submission(job=job, deadline=time.monotonic() + timeout_s)


class Running:
    """A pool that is closed at the end, and its engine."""

    def __init__(self, *specs, max_wait_s: float = 100.0) -> None:
        settings = Settings(
            models=list(specs) or [spec()],
            server={"devices": ["cpu"]},
            limits={"max_wait_s": max_wait_s},
        )
        self.backends = []
        self.pool = LocalPool(settings, make_backend=self._make)

    def _make(self):
        self.backends.append(make_backend())
        return self.backends[-1]

    async def hold(self) -> asyncio.Task[Completion]:
        """Occupy the device with a job until `release`."""
        held = asyncio.create_task(self.pool.submit(job(0, Fault.HOLD)))
        await eventually(lambda: self.pool._status.jobs)
        return held

    def release(self) -> None:
        self.backends[0].engine.released.set()

    async def queued(self, count: int) -> None:
        """Wait until `count` jobs wait or run."""
        await eventually(lambda: self.pool.devices()[0].queue_depth == count)

    async def __aenter__(self) -> LocalPool:
        await self.pool.start()
        return self.pool

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()


def is_own(submission: Submission, completion: Completion | BaseException) -> bool:
    return (
        isinstance(completion, Completion)
        and completion.outcome.id == submission.job.id
        and completion.device == "cpu"
        and completion.outcome.predictions[0].class_id == expected_class(submission.job.input)
    )


async def is_answered(pool, submission: Submission) -> bool:
    return is_own(submission, await pool.submit(submission))


async def submit_all(pool, jobs):
    return await asyncio.gather(*(pool.submit(item) for item in jobs), return_exceptions=True)


async def test_jobs_wait_for_their_model_and_share_batches():
    async with Running(spec(kind="slow")) as pool:
        assert [info.card.state for info in pool.models()] == ["loading"]
        assert pool.devices()[0].state == "starting"
        jobs = [job(n) for n in range(30)]
        answers = await submit_all(pool, jobs)
        assert all(map(is_own, jobs, answers))
        assert max(answer.batch_size for answer in answers) == 8
        assert all(answer.device_ms >= 2 for answer in answers)
        assert max(answer.queue_ms for answer in answers) > min(
            answer.queue_ms for answer in answers
        )
        await pool.wait_ready()
        (status,) = pool.devices()
        assert (status.state, status.models, status.queue_depth) == ("ready", ("fake@1",), 0)
        assert status.last_pass_s < 5


async def test_one_bad_job_harms_no_neighbour():
    async with Running() as pool:
        jobs = [job(n) for n in range(20)]
        bad = [job(100, Fault.RAISE), job(101, Fault.RAISE), job(102, Fault.MEMORY_ALONE)]
        answers = await submit_all(pool, [*jobs[:10], *bad, *jobs[10:]])
        harmed = answers[10:13]
        assert [type(error) for error in harmed] == [InternalError, InternalError, Overloaded]
        assert all(map(is_own, jobs, answers[:10] + answers[13:]))


async def test_memory_is_freed_before_the_halves_are_tried():
    running = Running()
    async with running as pool:
        blocker = await running.hold()
        jobs = [job(n) for n in range(1, 8)] + [job(9, Fault.MEMORY)]
        # An idle device has given back what loading left.
        freed = running.backends[0].engine.freed
        submitted = asyncio.create_task(submit_all(pool, jobs))
        await running.queued(9)
        running.release()
        assert all(map(is_own, jobs, await submitted))
        # For eight, four and two.
        assert running.backends[0].engine.freed == freed + 3
        await blocker
        again = await submit_all(pool, [job(n) for n in range(20, 40)])
        assert max(answer.batch_size for answer in again) == 1, "the batch was not lowered"


async def test_a_job_too_large_by_itself_does_not_lower_the_batch():
    running = Running()
    async with running as pool:
        blocker = await running.hold()
        jobs = [*(job(n) for n in range(1, 8)), job(9, Fault.MEMORY_ALONE)]
        submitted = asyncio.create_task(submit_all(pool, jobs))
        await running.queued(9)
        running.release()
        answers = await submitted
        assert [isinstance(answer, Overloaded) for answer in answers] == [False] * 7 + [True]
        await blocker
        again = await submit_all(pool, [job(n) for n in range(20, 40)])
        assert max(answer.batch_size for answer in again) == 8


async def test_a_lost_device_fails_everything_and_stays_lost():
    async with Running() as pool:
        await pool.wait_ready()
        answers = await submit_all(pool, [job(n) for n in range(3)] + [job(4, Fault.DEVICE)])
        assert {type(answer) for answer in answers} <= {WorkerLost, Completion}
        assert isinstance(answers[3], WorkerLost)
        with pytest.raises(WorkerLost):
            await pool.submit(job(1))
        assert pool.devices()[0].state == "lost"
        assert not pool.models()[0].card.ready


async def test_long_jobs_end_and_are_cancelled_between_steps():
    running = Running()
    async with running as pool:
        submission = job(1, Fault.LONG, 5)
        answer = await pool.submit(submission)
        assert is_own(submission, answer)
        assert answer.device_ms >= 50
        endless = asyncio.create_task(pool.submit(job(2, Fault.LONG, 255)))
        await running.queued(1)
        assert await is_answered(pool, job(3))
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        await running.queued(0)


async def test_news_of_a_long_job_reaches_those_who_ask():
    async with Running() as pool:
        await pool.wait_ready()
        heard = {}
        jobs = {}
        for news in ("none", "progress", "maps"):
            submission = structs.replace(job(len(jobs), Fault.LONG, 120), news=news)
            jobs[news], heard[news] = submission, []
        answers = await asyncio.gather(
            *(pool.submit(jobs[n], on_progress=heard[n].append) for n in jobs)
        )
        assert all(map(is_own, jobs.values(), answers))
    assert heard["none"] == []
    for news in ("progress", "maps"):
        done = [item.progress.done for item in heard[news]]
        assert done[0] == 0
        assert sorted(set(done)) == done
        assert 4 <= len(done) <= 12, "about every 200 ms of 1.2 s"
        assert {item.progress.total for item in heard[news]} == {120}
        assert {item.job_id for item in heard[news]} == {jobs[news].job.id}
    assert not any(item.progress.explanations for item in heard["progress"])
    shown = [item for item in heard["maps"] if item.progress.explanations]
    assert 1 <= len(shown) < len(heard["maps"])
    assert heard["maps"][0].seconds_left is None
    assert heard["maps"][-1].seconds_left < heard["maps"][1].seconds_left


async def test_maps_that_cannot_be_made_do_not_end_the_job(monkeypatch):
    plain = FakeSuspended.progress

    def progress(self, *, maps: bool):
        if maps:
            raise RuntimeError("out of memory")
        return plain(self, maps=False)

    monkeypatch.setattr(FakeSuspended, "progress", progress)
    async with Running() as pool:
        heard = []
        submission = structs.replace(job(1, Fault.LONG, 5), news="maps")
        assert is_own(submission, await pool.submit(submission, on_progress=heard.append))
    assert [item.progress.done for item in heard] == [0]


async def test_deadlines():
    running = Running()
    async with running as pool:
        await pool.wait_ready()
        blocker = await running.hold()
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await pool.submit(job(2, timeout_s=0.1))
        assert time.monotonic() - begun < 0.25
        with pytest.raises(DeadlineExceeded):
            await pool.submit(job(3, timeout_s=-1))
        running.release()
        await blocker


async def test_too_long_a_wait_is_refused():
    async with Running(max_wait_s=0.01) as pool:
        await pool.wait_ready()
        answers = await submit_all(pool, [job(n) for n in range(100)])
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        assert refused
        assert all(error.retry_after_s > 0 for error in refused)
        assert len(refused) < 100


async def test_broken_entries_are_listed_and_the_others_serve():
    async with Running(spec(), spec("broken", kind="broken")) as pool:
        await pool.wait_ready()
        states = {info.card.name: info.card.state for info in pool.models()}
        assert states == {"fake": "ready", "broken": "unavailable"}
        with pytest.raises(NotReady, match="broken"):
            await pool.submit(job(1, model="broken"))
        with pytest.raises(UnknownModel):
            await pool.submit(job(1, model="other"))
        assert await is_answered(pool, job(1))


async def test_a_catalog_of_broken_entries_is_an_error():
    async with Running(spec(kind="broken")) as pool:
        with pytest.raises(ModelLoadFailed, match="broken"):
            await pool.wait_ready()


async def test_the_card_follows_what_passes_take():
    async with Running() as pool:
        await pool.wait_ready()
        card, slow = pool.models()[0].card, 0
        while pool.models()[0].card.latency_ms[card.best_batch] < 10:
            slow += 1
            await pool.submit(job(slow, Fault.SLOW, 5))
        assert slow > 1, "one slow pass says little"


async def test_jobs_that_fail_make_none_cheaper(monkeypatch):
    monkeypatch.setattr(compute, "_LATENCIES_S", 0.0)
    async with Running() as pool:
        await pool.wait_ready()
        for number in range(40):
            await pool.submit(job(number, Fault.SLOW, 2))
        known = pool.models()[0].card.latency_ms
        for number in range(40):
            with pytest.raises(InternalError):
                await pool.submit(job(number, Fault.RAISE))
        assert pool.models()[0].card.latency_ms == known


async def test_loading_and_unloading():
    running = Running()
    async with running as pool:
        await pool.wait_ready()
        await pool.load(spec("second"))
        assert await is_answered(pool, job(1, model="second"))
        with pytest.raises(ModelLoadFailed):
            await pool.load(spec("third", kind="broken"))
        assert {info.card.name for info in pool.models()} == {"fake", "second"}
        jobs = [job(n, Fault.SLOW, 1, model="second") for n in range(20)]
        waiting = asyncio.create_task(submit_all(pool, jobs))
        await running.queued(20)
        await pool.unload("second")
        assert all(map(is_own, jobs, await waiting)), "the model was dropped under its jobs"
        with pytest.raises(UnknownModel):
            await pool.submit(job(1, model="second"))
        with pytest.raises(UnknownModel):
            await pool.unload("second")


async def test_closing_ends_jobs_in_flight():
    running = Running()
    async with running as pool:
        await pool.wait_ready()
        tasks = [asyncio.create_task(pool.submit(job(n, Fault.SLOW, 5))) for n in range(3)]
        await running.queued(3)
    for task in tasks:
        with pytest.raises(Draining):
            await task
    with pytest.raises(Draining):
        await running.pool.submit(job(1))


async def test_failures_are_heatlens_errors_only():
    async with Running() as pool:
        answers = await submit_all(pool, [job(1, Fault.RAISE), job(2, Fault.USER)])
        assert all(isinstance(answer, HeatlensError) for answer in answers)
        assert answers[1].field == "layers.0"


async def test_early_jobs_make_the_device_ready():
    """Jobs that wait for the model run before any canary pass and make the device ready."""
    running = Running()
    async with running as pool:
        await submit_all(pool, [job(n) for n in range(4)])
        await asyncio.wait_for(pool.wait_ready(), timeout=5)
