"""What processes hold while they are loaded, and whether it grows."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from benchmarks.servers import Server, role_of

SETTLED = 1 / 3  # share of a process's samples that count as warming up
_MEGA = 1e6
_FEWEST = 5


@dataclass(frozen=True)
class Sample:
    """One look at a process: requests done so far, resident megabytes, open files, sockets among them."""

    done: int
    rss_mb: float
    files: int
    sockets: int


@dataclass
class Process:
    """A process and its samples, in order."""

    pid: int
    role: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def settled(self) -> list[Sample]:
        """Samples without those of its warming up."""
        return self.samples[int(len(self.samples) * SETTLED) :]


class Sampler:
    """Looks at all processes of a server; those that end keep what was seen."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.processes: dict[int, Process] = {}

    def look(self, done: int) -> None:
        """Take a sample of every process after `done` requests."""
        for process in self._server.processes():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                sample = Sample(
                    done=done,
                    rss_mb=process.memory_info().rss / _MEGA,
                    files=process.num_fds(),
                    sockets=len(process.net_connections(kind="all")),
                )
                known = self.processes.get(process.pid)
                if known is None:
                    known = Process(pid=process.pid, role=role_of(process))
                    self.processes[process.pid] = known
                known.samples.append(sample)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of y over x; 0 where x does not move or points are few."""
    if len(xs) < _FEWEST or min(xs) == max(xs):
        return 0.0
    return float(np.polynomial.Polynomial.fit(xs, ys, 1).convert().coef[1])


def slope_per_10k(process: Process, attribute: str) -> float:
    """Growth of an attribute of the settled samples in 10,000 requests."""
    settled = process.settled
    xs = [sample.done / 10_000 for sample in settled]
    return slope(xs, [float(getattr(sample, attribute)) for sample in settled])
