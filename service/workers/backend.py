"""What the compute thread needs of an engine and of its listener. No torch here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from models.catalog import ModelSpec
from models.types import Failure, Job, ModelInfo, Outcome
from service.workers.entries import Pending

Result = Outcome | Failure | Pending


class Engine(Protocol):
    """Runs jobs of one model on a device; see `models.engine.Engine`."""

    def run(self, jobs: Sequence[Job]) -> Sequence[Result]:
        """One trunk pass for all jobs; a result each, in order."""
        ...

    def advance(self, pending: Sequence[Any]) -> Sequence[Result]:
        """One bounded step of each long job (its own `Pending`s); a result each, in order."""
        ...


class Registry(Protocol):
    """Holds the warm models of a device; see `models.registry.ModelRegistry`."""

    def load(self, spec: ModelSpec) -> ModelInfo:
        """Load, verify and warm a model version, then swap it in."""
        ...

    def unload(self, name: str, version: str) -> None:
        """Drop a model version."""
        ...

    def infos(self) -> Sequence[ModelInfo]:
        """Every model version, unavailable ones included."""
        ...

    def mark_unavailable(self, spec: ModelSpec, reason: str) -> object:
        """List a model version that could not be loaded."""
        ...


def process_memory_bytes() -> int:
    """Resident memory of this process: what a CPU device holds. 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Backend:
    """What runs on the device; made in the compute thread and used by no other.

    Attributes:
        free_memory: gives back what is not in use.
        memory_bytes: memory that is held on the device.
    """

    registry: Registry
    engine: Engine
    free_memory: Callable[[], object]
    memory_bytes: Callable[[], int] = process_memory_bytes


class Listener(Protocol):
    """Hears of results; called in the compute thread, so it must not block."""

    def answered(self, results: Sequence[Outcome | Failure]) -> None:
        """Jobs have ended."""
        ...

    def models_changed(self, infos: Sequence[ModelInfo]) -> None:
        """Models were loaded, dropped or found broken."""
        ...

    def lost(self, reason: str) -> None:
        """The device needs a new process; the thread has ended, the jobs on the board are unanswered."""
        ...


class DeviceLost(Exception):
    """The device needs a new process."""
