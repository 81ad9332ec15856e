"""Faults under load with real processes: each accepted job gets its own result, exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from fake_engine import Fault, expected_class, spec
from running import are_ready, report

from models.errors import (
    DeadlineExceeded,
    HeatlensError,
    InputQuarantined,
    InternalError,
    Overloaded,
    UnknownLayer,
    UnknownModel,
)
from service.devices.messages import Hello
from tests.waiting import eventually

pytestmark = [pytest.mark.process, pytest.mark.anyio]


async def submit_all(pool, jobs):
    """Submit all at once; outcomes or errors in order."""
    return await asyncio.gather(*(pool.submit(job) for job in jobs), return_exceptions=True)


async def received(pool) -> None:
    """Wait until the worker has received everything sent so far: it responds to a greeting."""
    (connection,) = pool._connections.values()
    before = connection.infos
    connection.send(Hello())
    await eventually(lambda: connection.infos is not before)


def steps_of(service, submission) -> int:
    """The number of steps of a long job that ran."""
    return sum(f"step:{submission.job.id}" in batch for batch in service.journal())


def is_own_result(submission, completion) -> bool:
    """Whether a result was computed from its job's image and arrived unharmed."""
    job = submission.job
    return (
        not isinstance(completion, BaseException)
        and completion.outcome.id == job.id
        and completion.outcome.predictions[0].class_id == expected_class(job.input)
        and (completion.outcome.explanations[0].map == job.input[:, :, 1]).all()
    )


async def test_every_result_belongs_to_its_job_and_batches_form(service, make_job):
    async with service.pool() as pool, service.pool() as other:
        jobs = [make_job(n) for n in range(400)]
        first, second = await asyncio.gather(
            submit_all(pool, jobs[::2]), submit_all(other, jobs[1::2])
        )
    assert all(map(is_own_result, jobs[::2], first))
    assert all(map(is_own_result, jobs[1::2], second))
    sizes = [len(batch) for batch in service.journal() if batch != ["canary"]]
    assert max(sizes) == 8
    assert sum(sizes) == 400
    assert max(outcome.batch_size for outcome in first) == 8
    assert all(outcome.device_ms >= 2 for outcome in first)


@pytest.mark.parametrize("fault", [Fault.KILL_ONCE, Fault.SEGFAULT, Fault.DEVICE, Fault.HANG_ONCE])
async def test_every_job_survives_one_exit_of_its_worker(service, make_job, fault):
    async with service.pool() as pool:
        await eventually(lambda: are_ready(pool))
        jobs = [make_job(n) for n in range(60)] + [make_job(1000, fault)]
        begun = time.monotonic()
        answers = await submit_all(pool, jobs)
        report(f"{fault.name}: all answered in {time.monotonic() - begun:.2f} s")
        (status,) = pool.devices()
    assert all(map(is_own_result, jobs, answers))
    assert status.restarts == 1
    (worker_exit,) = service.states.devices[0].exits
    assert jobs[-1].job.id in worker_exit.suspects
    alone = [batch for batch in service.journal() if jobs[-1].job.id in batch]
    assert alone[-1] == [jobs[-1].job.id]


async def test_an_input_that_ends_workers_is_quarantined_and_its_neighbours_finish(
    service, make_job
):
    async with service.pool() as pool, service.pool() as other:
        await eventually(lambda: are_ready(pool))
        harmful, same = make_job(7, Fault.KILL), make_job(7, Fault.KILL)
        jobs = [make_job(n) for n in range(100, 140)]
        answers = await submit_all(pool, [*jobs[:20], harmful, *jobs[20:]])
        assert isinstance(answers.pop(20), InputQuarantined)
        assert all(map(is_own_result, jobs, answers))
        assert service.states.devices[0].restarts == 2
        with pytest.raises(InputQuarantined):
            await other.submit(same)
        assert service.states.devices[0].restarts == 2, "it was tried again"


async def test_kills_under_load_lose_nothing(start_service, make_job):
    running = start_service(workers={"restarts": 100})
    answers, jobs, over = [], [], asyncio.Event()

    async def client(pool, number):
        while not over.is_set():
            jobs.append(make_job(number * 10_000 + len(jobs), Fault.SLOW, 1))
            job = jobs[-1]
            try:
                answers.append((job, await pool.submit(job)))
            except HeatlensError as error:
                answers.append((job, error))

    def more_answers(count):
        goal = len(answers) + count
        return lambda: len(answers) >= goal

    async def killer():
        for _ in range(5):
            await eventually(lambda: are_ready(pool))
            await eventually(more_answers(10))
            # A job that runs alone because it was part of an exit must not be killed by chance:
            # that quarantines it.
            await eventually(lambda: not any(job.worker_exits for job in running.status().jobs))
            os.kill(running.worker_pid(), signal.SIGKILL)
            await eventually(lambda: not are_ready(pool))
        over.set()

    async with running.pool() as pool:
        await eventually(lambda: are_ready(pool))
        await asyncio.gather(killer(), *(client(pool, n) for n in range(16)))
    lost = [answer for job, answer in answers if not is_own_result(job, answer)]
    report(f"{len(jobs)} jobs, {running.states.devices[0].restarts} kills, {len(lost)} lost")
    assert running.states.devices[0].restarts == 5
    assert len(answers) == len(jobs)
    assert len({job.job.id for job, _ in answers}) == len(jobs)
    assert not lost


async def test_one_of_two_workers_exits_and_the_other_serves(start_service, make_job):
    running = start_service(devices=["cpu:0", "cpu:1"])
    async with running.pool() as pool:
        await eventually(lambda: are_ready(pool))
        await eventually(lambda: pool.models()[0].card.devices == ("cpu:0", "cpu:1"))
        slow = [make_job(n, Fault.SLOW, 1) for n in range(80)]
        assert {end.device for end in await submit_all(pool, slow)} == {"cpu:0", "cpu:1"}
        jobs = [make_job(n, Fault.SLOW, 2) for n in range(200, 240)]
        task = asyncio.create_task(submit_all(pool, jobs))
        await eventually(lambda: running.status("cpu:1").jobs)
        os.kill(running.worker_pid("cpu:1"), signal.SIGKILL)
        assert all(map(is_own_result, jobs, await task))
        await eventually(lambda: are_ready(pool))
    served = {batch[0] for batch in running.journal()}
    assert {job.job.id for job in slow} & served


async def test_readiness_falls_within_a_second_of_the_last_device(service):
    async with service.pool() as pool:
        await eventually(lambda: are_ready(pool))
        os.kill(
            service.worker_pid(), signal.SIGSTOP
        )  # so that the successor cannot come up at once
        os.kill(service.worker_pid(), signal.SIGKILL)
        assert await eventually(lambda: not are_ready(pool)) < 1
        await eventually(lambda: are_ready(pool))


async def test_a_hang_is_ended_by_the_watchdog(service, make_job):
    async with service.pool() as pool:
        await eventually(lambda: are_ready(pool))
        hang = make_job(1, Fault.HANG)
        with pytest.raises(InputQuarantined):
            await pool.submit(hang)
    assert [e.reason for e in service.states.devices[0].exits] == ["hang", "hang"]


async def test_an_error_of_the_model_harms_only_its_own_job(service, make_job):
    async with service.pool() as pool:
        await eventually(lambda: are_ready(pool))
        jobs = [make_job(n) for n in range(30)]
        bad, user = make_job(500, Fault.RAISE), make_job(501, Fault.USER)
        answers = await submit_all(pool, [*jobs, bad, user])
    assert isinstance(answers[-2], InternalError)
    assert "like" not in str(answers[-2]), "the text of a foreign exception left the worker"
    assert isinstance(answers[-1], UnknownLayer)
    assert answers[-1].field == "layers.0"
    assert all(map(is_own_result, jobs, answers[:-2]))
    assert service.states.devices[0].restarts == 0


async def test_too_little_memory_halves_the_batch(service, make_job):
    async with service.pool() as pool:
        await eventually(lambda: are_ready(pool))
        blocker = asyncio.create_task(pool.submit(make_job(0, Fault.HOLD)))
        await eventually(lambda: service.status().jobs)
        jobs = [make_job(n) for n in range(1, 8)] + [make_job(9, Fault.MEMORY)]
        submitted = asyncio.create_task(submit_all(pool, jobs))
        await eventually(lambda: all(job.job.id in pool._in_flight for job in jobs))
        await received(pool)
        service.release()
        assert all(map(is_own_result, jobs, await submitted))
        await blocker
        later = [make_job(n) for n in range(200, 216)]
        answers = await submit_all(pool, later)
        assert max(answer.batch_size for answer in answers) < 8
        with pytest.raises(Overloaded) as refused:
            await pool.submit(make_job(10, Fault.MEMORY_ALONE))
        assert refused.value.retry_after_s
    assert service.states.devices[0].restarts == 0


async def test_deadlines_hold_even_without_a_worker(service, make_job):
    async with service.pool() as pool:
        await eventually(lambda: are_ready(pool))
        # A stopped supervisor does not restart the worker.
        os.kill(service.process.pid, signal.SIGSTOP)
        try:
            os.kill(service.worker_pid(), signal.SIGSTOP)
            begun = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await pool.submit(make_job(1, deadline=begun + 0.3))
            assert time.monotonic() - begun < 0.6
        finally:
            os.kill(service.worker_pid(), signal.SIGCONT)
            os.kill(service.process.pid, signal.SIGCONT)


async def test_a_cancelled_job_does_not_run(service, make_job):
    async with service.pool() as pool:
        await eventually(lambda: are_ready(pool))
        blocker = asyncio.create_task(pool.submit(make_job(1, Fault.HOLD)))
        await eventually(lambda: service.status().jobs)
        job = make_job(2)
        cancelled = asyncio.create_task(pool.submit(job))
        await eventually(lambda: job.job.id in pool._in_flight)
        cancelled.cancel()
        long = make_job(3, Fault.LONG, 200)
        running = asyncio.create_task(pool.submit(long))
        await eventually(lambda: long.job.id in pool._in_flight)
        await received(pool)
        service.release()
        await blocker
        await eventually(lambda: steps_of(service, long))
        running.cancel()
        await eventually(lambda: long.job.id not in pool._in_flight)
        await received(pool)
        # The cancelled job has left the device when another one has run.
        await pool.submit(make_job(4))
        steps = steps_of(service, long)
        for number in range(5, 10):
            await pool.submit(make_job(number, Fault.SLOW, 1))
        assert 0 < steps == steps_of(service, long) < 200
    assert not any(job.job.id in batch for batch in service.journal())


async def test_jobs_run_between_the_steps_of_a_long_one(service, make_job):
    async with service.pool() as pool:
        await eventually(lambda: are_ready(pool))
        long = make_job(3, Fault.LONG, 100)
        running = asyncio.create_task(pool.submit(long))
        await eventually(lambda: steps_of(service, long))
        for number in range(10):
            await pool.submit(make_job(number))
        assert not running.done(), "the short jobs waited for all its steps"
        outcome = await running
    assert is_own_result(long, outcome)
    assert outcome.device_ms > 100 * 10


async def test_models_are_loaded_replaced_and_unloaded_without_a_dropped_job(service, make_job):
    async with service.pool() as pool, service.pool() as other:
        await eventually(lambda: are_ready(pool))
        with pytest.raises(UnknownModel):
            await pool.submit(make_job(1, model="second"))
        over, answers = asyncio.Event(), []

        async def client(number):
            while not over.is_set():
                job = make_job(number)
                answers.append((job, await pool.submit(job)))

        clients = [asyncio.create_task(client(n)) for n in range(8)]
        await pool.load(spec("second", kind="slow"))
        # The other client hears of it by a message of its own.
        await eventually(lambda: any(info.card.name == "second" for info in other.models()))
        job = make_job(5, model="second")
        assert is_own_result(job, await other.submit(job))
        await pool.load(spec("fake", kind="slow"))
        await pool.unload("second")
        with pytest.raises(UnknownModel):
            await other.submit(make_job(1, model="second"))
        with pytest.raises(HeatlensError, match="broken"):
            await pool.load(spec("third", kind="broken"))
        await eventually(lambda: len(answers) > 50)
        over.set()
        await asyncio.gather(*clients)
        assert all(is_own_result(*pair) for pair in answers)

        await pool.load(spec("kept"))
        os.kill(service.worker_pid(), signal.SIGKILL)
        job = make_job(6, model="kept")
        assert is_own_result(job, await other.submit(job)), "a loaded model survives a restart"
