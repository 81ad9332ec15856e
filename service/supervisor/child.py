"""A child process that is restarted when it exits, within a budget."""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from service.settings import WorkerSettings

log = logging.getLogger("heatlens.supervisor")

_BACKOFF_S = 0.1
_BACKOFF_MAX_S = 5.0
_MOST_DOUBLINGS = 16


class RestartBudget:
    """Limits how soon and how often a process is restarted.

    The pause doubles with each consecutive exit of a process that had not proved itself. Jitter of
    up to a half keeps processes that failed together from restarting together.
    """

    def __init__(self, *, restarts: int, window_s: float) -> None:
        self._restarts = restarts
        self._window_s = window_s
        self._recent: deque[float] = deque()
        self._failures = 0

    def pause_s(self, now: float, *, proven: bool) -> float | None:
        """Pause before a restart, in seconds; None if the budget is spent.

        Args:
            now: `time.monotonic()`.
            proven: whether the process had worked before it exited.
        """
        while self._recent and self._recent[0] <= now - self._window_s:
            self._recent.popleft()
        if len(self._recent) >= self._restarts:
            return None
        self._recent.append(now)
        self._failures = 0 if proven else min(self._failures + 1, _MOST_DOUBLINGS)
        longest = min(_BACKOFF_MAX_S, math.ldexp(_BACKOFF_S, self._failures))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 # not for security


class Process(Protocol):
    """What is used of a `subprocess.Popen`."""

    @property
    def pid(self) -> int | None:
        """Process id; None while it has none yet."""

    def poll(self) -> int | None:
        """The exit code, once it has exited (negative: the signal that ended it)."""

    def send_signal(self, number: int, /) -> None:
        """Send it a signal."""

    def kill(self) -> None:
        """End it."""

    def wait(self) -> int:
        """Wait for its exit; returns the exit code."""


class Starter(Protocol):
    """Makes processes of one kind."""

    def start(self, arguments: Sequence[str], *, environment: Mapping[str, str]) -> Process:
        """Start one with these arguments and environment variables."""


class Command:
    """Makes processes that run a program; `--parent` and our process id come last."""

    def __init__(self, command: Sequence[str], *, inherit: Sequence[int] = ()) -> None:
        """Take program and first arguments, and the file descriptors to pass on."""
        self._command = command
        self._inherit = tuple(inherit)

    def start(
        self, arguments: Sequence[str], *, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start it in a group of its own.

        Ctrl-C in a terminal reaches only the supervisor, which stops the others in order.
        """
        return subprocess.Popen(  # noqa: S603
            [*self._command, *arguments, "--parent", str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=self._inherit,
            process_group=0,
        )


class Child:
    """A process and, after its exit, its successors.

    Attributes:
        incarnation: number of the current or last process; 0 = none yet.
        started_at: start time of that process.
        start_at: due time of the next start; None if none is due.
        given_up: whether the restart budget is spent.
    """

    def __init__(self, name: str, *, starter: Starter, settings: WorkerSettings) -> None:
        self.name = name
        self.incarnation = 0
        self.started_at = 0.0
        self.start_at: float | None = 0.0
        self.given_up = False
        self._budget = RestartBudget(restarts=settings.restarts, window_s=settings.restart_window_s)
        self._starter = starter
        self._process: Process | None = None
        self._is_announced = False

    @property
    def running(self) -> bool:
        """Whether a process was started and its exit has not been seen yet."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Process id, None if none runs."""
        return self._process.pid if self._process is not None else None

    def is_due(self, now: float) -> bool:
        """Whether the next process has to be started."""
        return self.start_at is not None and self.start_at <= now

    def start(
        self,
        arguments: Mapping[str, object],
        *,
        now: float,
        environment: Mapping[str, str | None],
    ) -> None:
        """Start the next process.

        Args:
            arguments: values of the command's options by name.
            now: `time.monotonic()`.
            environment: variables in addition to our own; None takes one away.
        """
        self.incarnation += 1
        self.start_at, self.started_at = None, now
        self._process = self._starter.start(
            [word for name, value in arguments.items() for word in (f"--{name}", str(value))],
            environment={k: v for k, v in (os.environ | environment).items() if v is not None},
        )
        self._is_announced = False
        self._announce()

    def reap(self) -> int | None:
        """The exit code of an exited process, once (negative: the signal that ended it)."""
        if self._process is None:
            return None
        code = self._process.poll()
        self._announce()
        if code is not None:
            self._process = None
        return code

    def _announce(self) -> None:
        """Log the start, once the process has a number."""
        if self.pid is not None and not self._is_announced:
            log.info("started %s, process %d", self.name, self.pid)
            self._is_announced = True

    def schedule(self, now: float, *, proven: bool) -> None:
        """Schedule a restart, or give up if the budget is spent; see `RestartBudget`."""
        pause_s = self._budget.pause_s(now, proven=proven)
        if pause_s is None:
            self.given_up = True
            log.error("%s is given up: its restart budget is spent", self.name)
        else:
            self.start_at = now + pause_s

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if one runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the process and wait for its exit."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def describe_exit(code: int) -> str:
    """Describe an exit code: `SIGKILL`, `exit 1`."""
    if code >= 0:
        return f"exit {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
