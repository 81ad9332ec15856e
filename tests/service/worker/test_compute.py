"""Models replaced under jobs that were resolved against the old one; reasons for batch sizes."""

from __future__ import annotations

import asyncio
import time

import msgspec
import numpy as np
import pytest
from fake_engine import Fault, image_of, make_backend, spec

from models.errors import ModelReplaced, NotReady, UnknownModel
from models.price import Price
from models.types import Failure, Job, JobOptions
from service.devices.messages import Completion, Submission
from service.settings import Settings
from service.worker.batcher import Batcher
from service.worker.local import LocalPool
from tests.waiting import eventually

KEY = ("m", "1")
LATENCY = {1: 10.0, 8: 24.0}


def job(
    number: int,
    *,
    fingerprint: str = "",
    deadline: float = 100.0,
    exits: int = 0,
    price: Price | None = None,
    **changes: object,
) -> Submission:
    plain = Job(
        id=str(number),
        operation="predict",
        model="m",
        version="1",
        input=np.zeros((1, 1, 3), dtype=np.uint8),
        options=JobOptions(),
    )
    return Submission(
        job=msgspec.structs.replace(plain, **changes),
        deadline=deadline,
        price=price or Price(),
        worker_exits=exits,
        fingerprint=fingerprint,
    )


def job_id(result: Completion | Failure) -> str:
    return result.outcome.id if isinstance(result, Completion) else result.id


def batcher(*, fingerprint: str = "old", best: int = 8) -> Batcher:
    made = Batcher()
    made.set_model(KEY, best_batch=best, latency_ms=LATENCY, fingerprint=fingerprint)
    return made


def test_jobs_of_another_model_are_refused():
    queue = batcher()
    queue.add(job(1, fingerprint="old"), 0)
    queue.add(job(2), 0)
    with pytest.raises(ModelReplaced):
        queue.add(job(3, fingerprint="new"), 0)
    stale = queue.set_model(KEY, best_batch=8, latency_ms=LATENCY, fingerprint="new")
    assert [entry.job.id for entry in stale] == ["1"]
    with pytest.raises(ModelReplaced):
        queue.add(job(4, fingerprint="old"), 0)
    queue.add(job(5, fingerprint="new"), 0)
    assert [entry.job.id for entry in queue.next(0).batch.entries] == ["2", "5"]
    assert queue.depth == 2


def test_a_model_that_is_loaded_again_keeps_its_jobs():
    queue = batcher()
    queue.add(job(1, fingerprint="old"), 0)
    assert queue.set_model(KEY, best_batch=8, latency_ms=LATENCY, fingerprint="old") == []
    assert queue.next(0).batch.entries[0].job.id == "1"


def test_a_running_job_of_a_replaced_model_finishes():
    queue = batcher()
    queue.add(job(1, fingerprint="old"), 0)
    queue.next(0)
    assert queue.set_model(KEY, best_batch=8, latency_ms=LATENCY, fingerprint="new") == []
    queue.done(1)
    assert queue.depth == 0


@pytest.mark.anyio
async def test_jobs_of_a_replaced_model_fail_after_the_new_one_is_announced():
    """The new model is announced before the jobs of the old one are refused."""
    settings = Settings(models=[spec()], server={"devices": ["cpu"]})
    backends = [make_backend()]
    pool = LocalPool(settings, make_backend=lambda: backends[0])
    await pool.start()
    try:
        await pool.wait_ready()
        old = pool.models()[0].fingerprint
        assert old

        def fresh(number: int, fault: Fault = Fault.NONE, argument: int = 0) -> Submission:
            return job(
                number,
                fingerprint=old,
                model="fake",
                input=image_of(number, fault, argument),
                deadline=time.monotonic() + 10,
            )

        heard = []
        told, answered = pool.on_models, pool.on_results
        pool.on_models = lambda infos: (heard.append("models"), told(infos))
        pool.on_results = lambda ends: (heard.extend(map(job_id, ends)), answered(ends))
        running = asyncio.create_task(pool.submit(fresh(0, Fault.HOLD)))
        await eventually(lambda: pool._status.jobs)
        loading = asyncio.create_task(pool.load(spec(task="multi_label")))
        waiting = [asyncio.create_task(pool.submit(fresh(n))) for n in range(1, 20)]
        await eventually(lambda: pool.devices()[0].queue_depth == 20)
        backends[0].engine.released.set()
        seen = []
        for task in waiting:
            try:
                await task
            except ModelReplaced:
                seen.append(pool.models()[0].fingerprint)
        await loading
        await running
        assert len(seen) > 1
        assert heard.index("models") < heard.index("1")
        assert set(seen) == {pool.models()[0].fingerprint} != {old}
    finally:
        await pool.close()


def test_jobs_of_an_unloaded_model_are_retried_if_they_were_resolved_against_it():
    queue = batcher()
    queue.close_model(KEY)
    with pytest.raises(ModelReplaced):
        queue.add(job(1, fingerprint="old"), 0)
    with pytest.raises(NotReady):
        queue.add(job(2), 0)
    queue.drop_model(KEY)
    with pytest.raises(ModelReplaced):
        queue.add(job(3, fingerprint="old"), 0)
    with pytest.raises(UnknownModel):
        queue.add(job(4), 0)


@pytest.mark.anyio
async def test_a_load_does_not_overtake_the_unload_of_the_same_model():
    settings = Settings(models=[spec(), spec("other")], server={"devices": ["cpu"]})
    pool = LocalPool(settings, make_backend=make_backend)
    await pool.start()
    try:
        await pool.wait_ready()
        slow = job(
            0,
            model="fake",
            # Between its steps the thread is free.
            input=image_of(0, Fault.LONG, 50),
            deadline=time.monotonic() + 10,
        )
        running = asyncio.create_task(pool.submit(slow))
        await eventually(lambda: pool._status.jobs)

        def states() -> set[tuple[str, bool]]:
            cards = [info.card for info in pool.models() if info.card.name == "fake"]
            return {(card.state, card.ready) for card in cards}

        unloading = asyncio.create_task(pool.unload("fake"))
        await eventually(lambda: states() == {("unloading", False)})
        await asyncio.gather(pool.load(spec()), unloading, running)
        assert {info.card.name: info.card.state for info in pool.models()} == {
            "fake": "ready",
            "other": "ready",
        }
        await pool.submit(job(1, model="fake", input=image_of(1), deadline=time.monotonic() + 10))
    finally:
        await pool.close()


# ---------------------------------------------------------------- reasons


def reason(queue: Batcher, *jobs: Submission, now: float = 0.0) -> tuple[str, int]:
    for item in jobs:
        queue.add(item, now)
    batch = queue.next(now).batch
    return batch.reason, len(batch.entries)


def test_reasons_of_batch_sizes():
    jobs = [job(n) for n in range(10)]
    assert reason(batcher(), *jobs) == ("full", 8)
    assert reason(batcher(), *jobs[:3]) == ("idle", 3)
    assert reason(batcher(best=1), *jobs[:1]) == ("full", 1)
    soon = job(0, deadline=0.017)
    assert reason(batcher(), soon, *jobs[1:]) == ("deadline", 4)
    suspect = job(0, deadline=1, exits=1)
    assert reason(batcher(), suspect, *jobs[1:]) == ("alone", 1)
    assert reason(batcher(), suspect) == ("alone", 1)
    late_suspect = job(0, deadline=101, exits=1)
    assert reason(batcher(), *jobs[1:3], late_suspect) == ("alone", 2)
    small = batcher()
    small.lower_batch(KEY, 2, until=10)
    assert reason(small, *jobs) == ("memory", 2)


def test_long_jobs_are_held_and_step():
    class Step:
        cost = 1

        def __init__(self, item: Job) -> None:
            self.job = item

    queue = Batcher(max_suspended=2)
    queue.set_model(KEY, best_batch=8, latency_ms=LATENCY)
    long = [job(n, price=Price(long=True)) for n in range(3)]
    assert reason(queue, *long) == ("held", 2)
    queue.done(0.01, suspended=[Step(item.job) for item in long[:2]])
    assert reason(queue, now=0.01) == ("step", 2)
