"""An HTTP process under supervision: its start, its restarts, and the order to drain."""

from __future__ import annotations

import logging
import signal

from service.devices.runtime_dir import RuntimeDir
from service.supervisor.child import Child, describe_exit

log = logging.getLogger("heatlens.supervisor")

_PROVEN_S = 5.0


class HttpProcess:
    """Keeps one HTTP process running."""

    def __init__(self, child: Child, *, runtime: RuntimeDir, listener: int) -> None:
        self.child = child
        self._runtime = runtime
        self._listener = listener

    def poll(self, now: float, *, restart: bool) -> None:
        """Handle the exit of the process, and start the next one when it is due."""
        pid = self.child.pid
        code = self.child.reap()
        if code is not None and pid is not None:
            log.info("%s exited: %s", self.child.name, describe_exit(code))
            self._runtime.forget_http(pid)
            if restart:
                self.child.schedule(now, proven=now - self.child.started_at > _PROVEN_S)
        if restart and self.child.is_due(now):
            self._start(now)

    def stop(self) -> None:
        """Tell the process to drain."""
        self.child.start_at = None
        self.child.signal(signal.SIGTERM)

    def _start(self, now: float) -> None:
        # A blocked signal is inherited and kept pending: a SIGHUP that comes before the process
        # can handle it neither ends it nor gets lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            self.child.start(
                {"runtime": self._runtime.path, "socket": self._listener},
                now=now,
                environment={
                    "PROMETHEUS_MULTIPROC_DIR": str(self._runtime.metrics_dir),
                    # Unused threads of a BLAS cost memory.
                    "OPENBLAS_NUM_THREADS": "1",
                    # Memory of large images and bodies goes back to the system (glibc), and that of
                    # small ones is kept for the next request.
                    "MALLOC_MMAP_THRESHOLD_": "4194304",
                    "MALLOC_TRIM_THRESHOLD_": "16777216",
                },
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
