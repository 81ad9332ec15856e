"""One HTTP process in the supervisor: started, started again, and replaced without a gap."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from service.devices.runtime_dir import RuntimeDir
from service.settings import WorkerSettings
from service.supervisor.child import Child, RestartBudget, describe_end

log = logging.getLogger("heatlens.supervisor")

_PROVEN_S = 5.0
_SUCCESSOR_S = 60.0


@dataclass(frozen=True, slots=True)
class HttpLaunch:
    """How HTTP processes are started.

    Attributes:
        command: program and first arguments.
        listener: descriptor of the listening socket.
    """

    command: Sequence[str]
    runtime: RuntimeDir
    listener: int

    def start(self, child: Child, now: float) -> None:
        """Start a child's next process."""
        child.incarnation += 1
        arguments = {
            "--runtime": str(self.runtime.path),
            "--socket": str(self.listener),
            "--parent": str(os.getpid()),
        }
        child.start(
            [*self.command, *(word for pair in arguments.items() for word in pair)],
            now=now,
            environment={
                "PROMETHEUS_MULTIPROC_DIR": str(self.runtime.metrics_dir),
                "OPENBLAS_NUM_THREADS": "1",  # each thread of a BLAS nobody calls costs memory
            },
            inherit=[self.listener],
        )


class HttpProcess:
    """Keeps one HTTP process running.

    To replace it, its successor is started first; when that serves, the old one is told to drain.
    Both accept from the same listening socket, so at no moment is a connection refused.

    Attributes:
        child: the process that serves.
    """

    def __init__(self, index: int, settings: WorkerSettings) -> None:
        self._name = f"HTTP process {index}"
        self._settings = settings
        self.child = self._new_child()
        self._successor: Child | None = None
        self._leaving: Child | None = None
        self._late_at = 0.0
        self._failed = False

    def poll(self, launch: HttpLaunch, now: float, *, restart: bool) -> None:
        """See to processes that have ended, and go on with a replacement."""
        if self._has_ended(self.child, launch) and restart:
            proven = now - self.child.started_at > _PROVEN_S
            if not self.child.schedule(now, proven=proven):
                log.error("%s is given up: its restart budget is spent", self._name)
        if self._leaving is not None:
            if self._has_ended(self._leaving, launch):
                self._leaving = None
            elif now >= self._late_at:
                self._leaving.kill_soon()
        if restart and self.child.start_at is not None and self.child.start_at <= now:
            launch.start(self.child, now)

    # ---------------------------------------------------------------- replacement

    def replace(self, launch: HttpLaunch, now: float) -> None:
        """Start a successor."""
        self._failed = False
        self._successor = self._new_child()
        launch.start(self._successor, now)
        self._late_at = now + _SUCCESSOR_S

    def advance(self, launch: HttpLaunch, now: float, *, grace_s: float) -> None:
        """Let the old process drain once its successor serves; give up on one that does not come to that."""
        successor = self._successor
        if successor is None or successor.pid is None:
            return
        if launch.runtime.http_file(successor.pid).exists():
            self._leaving, self.child, self._successor = self.child, successor, None
            self._leaving.signal(signal.SIGTERM)
            self._late_at = now + grace_s + 1
        elif self._has_ended(successor, launch) or now >= self._late_at:
            successor.kill()
            self._successor = None
            self._failed = True

    @property
    def replacing(self) -> bool:
        """Whether a replacement is under way."""
        return self._successor is not None or self._leaving is not None

    @property
    def replacement_failed(self) -> bool:
        """Whether the last successor never served; the old process serves on."""
        return self._failed

    # ---------------------------------------------------------------- all of them

    def children(self) -> list[Child]:
        """Every process of the slot."""
        return [c for c in (self.child, self._successor, self._leaving) if c is not None]

    def stop(self) -> None:
        """Tell every process to drain."""
        for child in self.children():
            child.start_at = None
            if child is not self._leaving:  # a second SIGTERM would end it at once
                child.signal(signal.SIGTERM)

    def _has_ended(self, child: Child, launch: HttpLaunch) -> bool:
        pid = child.pid
        code = child.reap()
        if code is None or pid is None:
            return False
        log.info("%s ended: %s", child.name, describe_end(code))
        launch.runtime.forget_http(pid)
        return True

    def _new_child(self) -> Child:
        budget = RestartBudget(
            restarts=self._settings.restarts, window_s=self._settings.restart_window_s
        )
        return Child(name=self._name, budget=budget)
