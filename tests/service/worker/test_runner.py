"""A long run that makes progress is told from a hang."""

from __future__ import annotations

import time

import numpy as np

from models.types import Job, JobOptions, ModelCard, ModelInfo, Outcome
from service.devices.messages import Submission
from service.devices.status import WorkerStatus
from service.settings import WorkerSettings
from service.supervisor.device_process import is_hung
from service.worker.backend import Backend
from service.worker.queue import Batch, Entry
from service.worker.runner import Runner


class SlowEngine:
    """Takes 30 s for a batch, and shows every 3 s that it makes progress, if it does."""

    def __init__(self, clock: list[float], *, beats: bool) -> None:
        self.clock = clock
        self.beats = beats
        self.beat = lambda: None

    def run(self, jobs: list[Job]) -> list[Outcome]:
        for _ in range(10):
            self.clock[0] += 3
            if self.beats:
                self.beat()
        return [Outcome(id=job.id, predictions=()) for job in jobs]


def statuses_of_a_long_run(monkeypatch, *, beats: bool) -> list[WorkerStatus]:
    clock, written = [1000.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    engine = SlowEngine(clock, beats=beats)
    backend = Backend(registry=None, engine=engine, free_memory=lambda: None)
    runner = Runner(backend, write_status=written.append)
    pixels = np.zeros((1, 1, 3), np.uint8)
    job = Job(
        id="1", operation="predict", model="m", version="1", input=pixels, options=JobOptions()
    )
    entry = Entry(
        submission=Submission(job=job, deadline=9e9), job_class="interactive", arrived=0.0
    )
    runner.run(Batch.of([entry], predicted_ms=10, now=clock[0], reason="idle"))
    return written


def longest_silence_s(written: list[WorkerStatus]) -> float:
    running = [status for status in written if status.activity == "batch"]
    assert all(status.jobs for status in running), "the status names the jobs throughout"
    ends = [status.since for status in written[1:]]
    return max(end - status.since for status, end in zip(written, ends, strict=False))


def test_a_lively_run_is_no_hang(monkeypatch):
    settings = WorkerSettings(hang_floor_s=10)
    silent = statuses_of_a_long_run(monkeypatch, beats=False)
    assert is_hung(silent[0], now=silent[0].since + longest_silence_s(silent), settings=settings)
    lively = statuses_of_a_long_run(monkeypatch, beats=True)
    assert longest_silence_s(lively) == 3
    assert not is_hung(lively[0], now=lively[0].since + 3, settings=settings)


def test_memory_is_released_when_the_device_is_idle():
    held, freed = [1000], []

    def free() -> None:
        freed.append(held[0])
        held[0] = 400

    engine = SlowEngine([0.0], beats=False)
    backend = Backend(registry=None, engine=engine, free_memory=free, memory_bytes=lambda: held[0])
    runner = Runner(backend, write_status=lambda _: None)
    card = ModelCard(name="m", version="1", state="ready", ready=True, source="python:m")
    for grown, expected in ((1000, [1000]), (450, [1000]), (900, [1000, 900])):
        held[0] = grown
        assert runner.canary(ModelInfo(card=card)) is not None
        assert freed == expected


def test_the_time_of_a_canary_pass_is_that_of_the_pass():
    """Requests are priced by it, and to release memory takes much longer."""
    engine = SlowEngine([0.0], beats=False)
    backend = Backend(registry=None, engine=engine, free_memory=lambda: time.sleep(0.3))
    runner = Runner(backend, write_status=lambda _: None)
    card = ModelCard(name="m", version="1", state="ready", ready=True, source="python:m")
    assert runner.canary(ModelInfo(card=card)) < 200
