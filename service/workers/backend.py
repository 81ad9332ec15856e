"""What the compute thread needs of an engine and of its listener. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Backend:
    """What runs on the device; made in the compute thread and used by no other."""

    registry: Registry
    engine: Engine
    free_memory: Callable[[], object]


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
