"""The worker process of one device: its start, the detection of hangs, and the record of exits."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter

from service.devices.runtime_dir import RuntimeDir
from service.devices.status import (
    EXIT_DEVICE_LOST,
    MAX_EXITS,
    MAX_QUARANTINED,
    DeviceState,
    ProcessState,
    WorkerExit,
    WorkerStatus,
    WorkerStatusFile,
)
from service.settings import WorkerSettings
from service.supervisor.child import Child, describe_exit

log = logging.getLogger("heatlens.supervisor")

LOAD_TIMEOUT_S = 300.0
"""Longest time for a worker's start, or for loading one model, before it counts as a hang."""

_MAX_LOAD_EXITS = 2
_KEYS_PREFIX = "HEATLENS_SECURITY"


class DeviceProcess:
    """Keeps the worker of one device running.

    Attributes:
        refused_models: `name@version` of models whose loading ended workers twice.
    """

    def __init__(
        self,
        device: str,
        child: Child,
        *,
        settings: WorkerSettings,
        runtime: RuntimeDir,
        threads: int,
    ) -> None:
        self.device = device
        self.child = child
        self.refused_models: set[str] = set()
        self._settings = settings
        self._runtime = runtime
        self._threads = threads
        self._file: WorkerStatusFile | None = None
        self._hung = False
        self._exits: tuple[WorkerExit, ...] = ()
        self._load_exits: Counter[str] = Counter()
        self._proven: set[str] = set()
        self._restart_reasons: Counter[str] = Counter()
        self._quarantined: list[str] = []

    def state(self) -> DeviceState:
        """The state of the device, as published to all processes."""
        state: ProcessState = "running" if self.child.running else "restarting"
        return DeviceState(
            device=self.device,
            incarnation=self.child.incarnation,
            state="given_up" if self.child.given_up else state,
            restarts=max(0, self.child.incarnation - 1),
            restart_reasons=dict(self._restart_reasons),
            exits=self._exits,
        )

    def poll(self, now: float, *, restart: bool) -> None:
        """Handle a worker that has exited, and kill one that hangs."""
        code = self.child.reap()
        if code is not None:
            self._on_exit(code, now, restart=restart)
        elif self.child.running and not self._hung:
            # Until it writes its status a worker is importing: allow as much time as for a model.
            starting = WorkerStatus(activity="load", since=self.child.started_at)
            self._hung = is_hung(self._status() or starting, now=now, settings=self._settings)
            if self._hung:
                log.error("%s hangs: killing it", self.child.name)
                self.child.signal(signal.SIGKILL)

    def start_if_due(self, now: float) -> None:
        """Start the first worker, or the next one when its pause is over."""
        if not self.child.is_due(now):
            return
        incarnation = self.child.incarnation + 1
        self._file = WorkerStatusFile.create(self._runtime.status_file(self.device, incarnation))
        self._hung = False
        # Of numpy's BLAS nothing is asked here; its threads would be in the way of forks.
        threads = {"OMP_NUM_THREADS": str(self._threads), "OPENBLAS_NUM_THREADS": "1"}
        # Threads that spin for long while they wait hold the cores that others need, HTTP processes
        # among them: beside other work a pass then takes several times as long.
        threads["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "3000")
        self.child.start(
            {
                "runtime": self._runtime.path,
                "device": self.device,
                "incarnation": incarnation,
                "threads": self._threads,
            },
            now=now,
            environment=_without_keys() | (threads if self.device.startswith("cpu") else {}),
        )

    def take_quarantined(self) -> list[str]:
        """The digests of inputs to quarantine that were found since the last call."""
        taken, self._quarantined = self._quarantined, []
        return taken

    def _on_exit(self, code: int, now: float, *, restart: bool) -> None:
        reason = "hang" if self._hung else describe_exit(code)
        status = self._status() or WorkerStatus()
        level = logging.ERROR if restart else logging.INFO
        log.log(level, "%s exited: %s", self.child.name, reason, extra=_request_ids(status))
        self._record_exit(reason, status)
        incarnation = self.child.incarnation
        self._runtime.status_file(self.device, incarnation).unlink(missing_ok=True)
        self._runtime.socket_path(self.device, incarnation).unlink(missing_ok=True)
        if restart:
            self.child.schedule(now, proven=status.ready)
            if not self.child.given_up:
                self._restart_reasons["hang" if self._hung else _exit_reason(code)] += 1

    def _status(self) -> WorkerStatus | None:
        return self._file.read() if self._file is not None else None

    def _record_exit(self, reason: str, status: WorkerStatus) -> None:
        """Record which jobs and which model were on the device."""
        if self._file is not None:
            self._file.close()
            self._file = None
        # A job that was part of an exit before ran alone: no other job can have caused this one.
        self._quarantined += [job.digest for job in status.jobs if job.worker_exits and job.digest]
        self._proven.update(status.models)
        # A model that was warm here before did not cause the exit of a worker that reloaded it.
        if status.activity == "load" and status.subject not in self._proven:
            self._load_exits[status.subject] += 1
            if self._load_exits[status.subject] >= _MAX_LOAD_EXITS:
                self.refused_models.add(status.subject)
        worker_exit = WorkerExit(
            incarnation=self.child.incarnation,
            reason=reason,
            suspects=tuple(job.id for job in status.jobs),
        )
        self._exits = (*self._exits, worker_exit)[-MAX_EXITS:]


class Quarantine:
    """Digests of jobs that are refused for some seconds, since two workers exited with them."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[str, float] = {}

    def add(self, digest: str, now: float) -> None:
        """Refuse a job from now on, or again from now on."""
        self._until.pop(digest, None)
        self._until[digest] = now + self._seconds

    def digests(self, now: float) -> tuple[str, ...]:
        """The jobs that are refused, oldest first."""
        kept = [(digest, until) for digest, until in self._until.items() if until > now]
        self._until = dict(kept[-MAX_QUARANTINED:])
        return tuple(self._until)


def is_hung(status: WorkerStatus, *, now: float, settings: WorkerSettings) -> bool:
    """Whether the device's current activity has taken far longer than predicted."""
    if status.activity == "idle":
        return False
    limit_s = max(settings.hang_floor_s, settings.hang_factor * status.predicted_s)
    return now - status.since > (LOAD_TIMEOUT_S if status.activity == "load" else limit_s)


def _exit_reason(code: int) -> str:
    """The exit reason as a metric label of few values."""
    if code == EXIT_DEVICE_LOST:
        return "device_lost"
    return "crash" if code < 0 else "exit"


def _request_ids(status: WorkerStatus) -> dict[str, object]:
    """The ids of the requests that were on the device, as `extra` for the logger."""
    ids = tuple(dict.fromkeys(job.request_id for job in status.jobs if job.request_id))
    return {"fields": {"request_ids": ids}} if ids else {}


def _without_keys() -> dict[str, str | None]:
    """Takes the variables away that hold keys: a worker runs code of users (`python:` sources)."""
    return dict.fromkeys(name for name in os.environ if name.startswith(_KEYS_PREFIX))
