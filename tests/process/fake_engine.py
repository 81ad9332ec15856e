"""A fast engine without torch, with results that can be checked and faults on demand.

The first row of a job's image is a script: pixel (0, 0) holds a `Fault` code, (0, 1) its argument.
The result of a sound job is computed from the image, so that a test can match them.
"""

from __future__ import annotations

import enum
import os
import signal
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed, UnknownModel
from models.types import (
    ClassScore,
    Explanation,
    Failure,
    Job,
    ModelCard,
    ModelInfo,
    Outcome,
    Preprocess,
    Progress,
)
from service.worker.backend import Backend

SIDE = 8


class Fault(enum.IntEnum):
    """The effect of an image on the engine."""

    NONE = 0
    # SIGKILL, each time.
    KILL = 1
    SEGFAULT = 2
    HANG = 3
    RAISE = 4
    # A sticky CUDA error.
    DEVICE = 5
    # Out of memory unless alone.
    MEMORY = 6
    MEMORY_ALONE = 7
    # A typed failure.
    USER = 8
    # Takes as many times 10 ms as its argument.
    SLOW = 9
    # Takes as many steps as its argument.
    LONG = 10
    # SIGKILL, but only in the first incarnation.
    KILL_ONCE = 11
    HANG_ONCE = 12
    # Waits until the test releases the engine.
    HOLD = 13


def image_of(number: int, fault: Fault = Fault.NONE, argument: int = 0) -> np.ndarray:
    """An image that differs for each number."""
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[1:] = np.random.default_rng(number).integers(0, 256, (SIDE - 1, SIDE, 3), dtype=np.uint8)
    pixels[0, 0, 0], pixels[0, 1, 0] = fault, argument
    return pixels


def expected_class(pixels: np.ndarray) -> int:
    """The class that the fake engine finds in an image."""
    return zlib.crc32(pixels.tobytes()) % 1_000_000


@dataclass
class FakeSuspended:
    job: Job
    left: int
    cost: int = 1
    done: int = 0

    def progress(self, *, maps: bool) -> Progress:
        explanations = outcome(self.job).explanations if maps and self.done else ()
        return Progress(
            what="rise",
            done=self.done,
            total=self.done + self.left,
            explanations=explanations,
        )


class FakeRegistry:
    """Models by name; `source` selects the outcome of loading, such as `python:fake.slow`."""

    def __init__(self) -> None:
        self._infos: dict[tuple[str, str], ModelInfo] = {}

    def load(self, spec: ModelSpec) -> ModelInfo:
        kind = spec.source.split(":")[1]
        if kind == "fake.broken":
            raise ModelLoadFailed("The fake model is broken.")
        if kind == "fake.crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "fake.slow":
            time.sleep(0.3)
        card = ModelCard(
            name=spec.name,
            version=spec.version,
            state="ready",
            ready=True,
            source=spec.source,
            num_classes=1_000_000,
            task=spec.task or "single_label",
            input=Preprocess(resize=SIDE, crop=(SIDE, SIDE)),
            best_batch=8,
            latency_ms={1: 2.0, 2: 2.5, 4: 3.0, 8: 4.0},
        )
        labels = tuple(spec.labels) if isinstance(spec.labels, list) else ()
        info = ModelInfo(card=card, labels=labels)
        self._infos[spec.name, spec.version] = info
        return info

    def unload(self, name: str, version: str) -> None:
        del self._infos[name, version]

    def infos(self) -> list[ModelInfo]:
        return list(self._infos.values())

    def mark_unavailable(self, spec: ModelSpec, reason: str, *, cause: str | None = None) -> None:
        card = ModelCard(
            name=spec.name,
            version=spec.version,
            state="unavailable",
            ready=False,
            source=spec.source,
            reason=reason,
        )
        self._infos[spec.name, spec.version] = ModelInfo(card=card)

    def get(self, name: str, version: str) -> ModelInfo:
        info = self._infos.get((name, version))
        if info is None or not info.card.ready:
            raise UnknownModel("not loaded")
        return info


class FakeEngine:
    """Sleeps 2 ms per batch and obeys the images.

    Args:
        first_incarnation: whether faults that happen once happen now.
        journal: file to which each run's job ids are appended, one batch a line; a file `release`
            in the same folder releases jobs that are held.

    Attributes:
        released: releases jobs that are held, when set.
    """

    def __init__(
        self, registry: FakeRegistry, *, first_incarnation: bool = True, journal: Path | None = None
    ) -> None:
        self._registry = registry
        self._first = first_incarnation
        self._journal = journal
        self.freed = 0
        self.released = threading.Event()

    def run(self, jobs: list[Job]) -> list[Outcome | Failure | FakeSuspended]:
        assert len({(job.model, job.version) for job in jobs}) == 1
        self._registry.get(jobs[0].model, jobs[0].version)
        self._note([job.id for job in jobs])
        time.sleep(0.002)
        return [self._one(job, alone=len(jobs) == 1) for job in jobs]

    def advance(self, suspended: list[FakeSuspended]) -> list[Outcome | Failure | FakeSuspended]:
        self._note([f"step:{item.job.id}" for item in suspended])
        time.sleep(0.01)
        results: list[Outcome | Failure | FakeSuspended] = []
        for item in suspended:
            item.left -= 1
            item.done += 1
            results.append(item if item.left > 0 else outcome(item.job))
        return results

    def free_memory(self) -> None:
        self.freed += 1

    def _hold(self) -> None:
        release = self._journal and self._journal.with_name("release")
        while not (release.exists() if release else self.released.is_set()):
            time.sleep(0.002)

    def _note(self, ids: list[str]) -> None:
        if self._journal is not None:
            with self._journal.open("a") as file:
                file.write(" ".join(ids) + "\n")

    def _one(self, job: Job, *, alone: bool) -> Outcome | Failure | FakeSuspended:
        fault, argument = Fault(int(job.input[0, 0, 0])), int(job.input[0, 1, 0])
        match fault:
            case Fault.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Fault.KILL_ONCE if self._first:
                os.kill(os.getpid(), signal.SIGKILL)
            case Fault.SEGFAULT if self._first:
                # To this thread: os.kill would let it run on for a moment.
                signal.raise_signal(signal.SIGSEGV)
            case Fault.HANG:
                time.sleep(3600)
            case Fault.HANG_ONCE if self._first:
                time.sleep(3600)
            case Fault.RAISE:
                raise ValueError("the model did not like this one")
            case Fault.DEVICE if self._first:
                raise RuntimeError("CUDA error: device-side assert triggered")
            case Fault.MEMORY if not alone:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case Fault.MEMORY_ALONE:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case Fault.USER:
                return Failure(
                    id=job.id, code="unknown_layer", message="No such layer.", field="layers.0"
                )
            case Fault.SLOW:
                time.sleep(argument / 100)
            case Fault.HOLD:
                self._hold()
            case Fault.LONG:
                return FakeSuspended(job, left=argument)
        return outcome(job)


def outcome(job: Job) -> Outcome:
    """The result of a sound job."""
    found = ClassScore(class_id=expected_class(job.input), score=1.0, probability=0.5)
    explanation = Explanation(
        method="gradcam",
        layer="last",
        target=found,
        map=job.input[:, :, 1].astype(np.float32),
        signed=False,
        degenerate=False,
    )
    return Outcome(id=job.id, predictions=(found,), explanations=(explanation,))


def make_backend(*, first_incarnation: bool = True, journal: Path | None = None) -> Backend:
    """A fake device."""
    registry = FakeRegistry()
    engine = FakeEngine(registry, first_incarnation=first_incarnation, journal=journal)
    return Backend(registry=registry, engine=engine, free_memory=engine.free_memory)


def spec(
    name: str = "fake", *, kind: str = "fast", version: str = "1", **rest: object
) -> ModelSpec:
    """A catalog entry for the fake registry."""
    return ModelSpec.model_validate(
        {"name": name, "version": version, "source": f"python:fake.{kind}", **rest}
    )
