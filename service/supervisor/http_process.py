"""An HTTP process as the supervisor sees it: started and restarted."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from service.devices.runtime_dir import RuntimeDir
from service.settings import WorkerSettings
from service.supervisor.child import Child, RestartBudget, describe_exit

log = logging.getLogger("heatlens.supervisor")

_PROVEN_S = 5.0


@dataclass(frozen=True, slots=True)
class HttpLaunch:
    """The way HTTP processes are started.

    Attributes:
        command: program and first arguments.
        listener: descriptor of the listening socket.
    """

    command: Sequence[str]
    runtime: RuntimeDir
    listener: int


class HttpProcess:
    """Keeps one HTTP process running.

    Attributes:
        child: its process.
    """

    def __init__(self, index: int, settings: WorkerSettings) -> None:
        budget = RestartBudget(restarts=settings.restarts, window_s=settings.restart_window_s)
        self.child = Child(name=f"HTTP process {index}", budget=budget)

    def poll(self, launch: HttpLaunch, now: float, *, restart: bool) -> None:
        """Handle the exit of the process, and start the next one when it is due."""
        pid = self.child.pid
        code = self.child.reap()
        if code is not None and pid is not None:
            log.info("%s exited: %s", self.child.name, describe_exit(code))
            launch.runtime.forget_http(pid)
            proven = now - self.child.started_at > _PROVEN_S
            if restart and not self.child.schedule(now, proven=proven):
                log.error("%s is given up: its restart budget is spent", self.child.name)
        if restart and self.child.start_at is not None and self.child.start_at <= now:
            self._start(launch, now)

    def stop(self) -> None:
        """Tell the process to drain."""
        self.child.start_at = None
        self.child.signal(signal.SIGTERM)

    def _start(self, launch: HttpLaunch, now: float) -> None:
        self.child.incarnation += 1
        arguments = {
            "--runtime": str(launch.runtime.path),
            "--socket": str(launch.listener),
            "--parent": str(os.getpid()),
        }
        # A blocked signal is inherited and kept pending: a SIGHUP that comes before the process
        # can handle it neither ends it nor gets lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            self.child.start(
                [*launch.command, *(word for pair in arguments.items() for word in pair)],
                now=now,
                environment={
                    "PROMETHEUS_MULTIPROC_DIR": str(launch.runtime.metrics_dir),
                    "OPENBLAS_NUM_THREADS": "1",  # unused threads of a BLAS cost memory
                },
                inherit=[launch.listener],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
