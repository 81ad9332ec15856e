"""Loads and unloads of models, as tasks of the compute thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.catalog import ModelSpec
from models.errors import HeatlensError
from models.types import ModelKey

Done = Callable[[HeatlensError | None], None]


@dataclass(frozen=True, slots=True)
class LoadTask:
    """Load a model version.

    Attributes:
        done: called with the error, or None.
        initial: whether it is one of the models that the thread starts with.
    """

    spec: ModelSpec
    done: Done
    initial: bool = False

    @property
    def keys(self) -> tuple[ModelKey, ...]:
        """The model version."""
        return (self.spec.key,)


@dataclass(frozen=True, slots=True)
class UnloadTask:
    """Drop model versions once their jobs have finished."""

    keys: tuple[ModelKey, ...]
    done: Done


Task = LoadTask | UnloadTask


class TaskQueue:
    """Tasks in order of arrival, except that an unload may have to wait."""

    def __init__(self, specs: Sequence[ModelSpec]) -> None:
        self._tasks: deque[Task] = deque(LoadTask(spec, _ignore, initial=True) for spec in specs)

    def add(self, task: Task) -> None:
        """Append a task."""
        self._tasks.append(task)

    def take(self, task: Task) -> None:
        """Remove a task that is started."""
        self._tasks.remove(task)

    def ready(self, has_jobs: Callable[[ModelKey], bool]) -> Task | None:
        """The first task that can start.

        An unload waits for the model's jobs, and later tasks of the same model wait for it.
        """
        blocked: set[ModelKey] = set()
        for task in self._tasks:
            busy = isinstance(task, UnloadTask) and any(map(has_jobs, task.keys))
            if not busy and blocked.isdisjoint(task.keys):
                return task
            blocked.update(task.keys)
        return None

    def initial_specs(self) -> list[ModelSpec]:
        """Models of the start that have not been tried yet."""
        return [t.spec for t in self._tasks if isinstance(t, LoadTask) and t.initial]


def _ignore(error: HeatlensError | None) -> None:
    """Discard the result of loading a configured model."""
