"""One device in the supervisor: its worker process, its board, its watchdog, and what its deaths teach."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence

from service.devices.runtime_dir import RuntimeDir
from service.devices.status import (
    MAX_EXITS,
    DeviceState,
    ProcessState,
    WorkerExit,
    WorkerStatus,
    WorkerStatusFile,
    is_hung,
)
from service.settings import WorkerSettings
from service.supervisor.child import Child, RestartBudget, describe_end
from service.worker.backend import EXIT_DEVICE_LOST

log = logging.getLogger("heatlens.supervisor")

LOAD_TIMEOUT_S = 300.0
"""Longest time for a worker's start, or for loading one model, before it is called a hang."""

_LOAD_DEATHS = 2


class DeviceProcess:
    """Keeps one device worker running.

    Attributes:
        device: `cuda:0`, `cpu:1`, …
        child: its process.
        refused_models: `name@version` of models whose loading ended workers twice.
    """

    def __init__(
        self, device: str, *, settings: WorkerSettings, command: Sequence[str], threads: int
    ) -> None:
        budget = RestartBudget(restarts=settings.restarts, window_s=settings.restart_window_s)
        self.device = device
        self.child = Child(name=f"device worker {device}", budget=budget)
        self.refused_models: set[str] = set()
        self._settings = settings
        self._command = tuple(command)
        self._threads = threads
        self._board: WorkerStatusFile | None = None
        self._hung = False
        self._deaths: tuple[WorkerExit, ...] = ()
        self._load_deaths: Counter[str] = Counter()
        self._proven: set[str] = set()
        self._restart_reasons: Counter[str] = Counter()
        self._quarantined: list[str] = []

    def life(self) -> DeviceState:
        """What everyone may know."""
        life: ProcessState = "up" if self.child.running else "down"
        return DeviceState(
            device=self.device,
            incarnation=self.child.incarnation,
            life="given_up" if self.child.given_up else life,
            restarts=max(0, self.child.incarnation - 1),
            restart_reasons=dict(self._restart_reasons),
            deaths=self._deaths,
        )

    def poll(self, runtime: RuntimeDir, now: float, *, restart: bool) -> None:
        """See to a worker that has ended, or that hangs."""
        code = self.child.reap()
        if code is not None:
            reason = "hang" if self._hung else describe_end(code)
            board = self._learn(reason)
            log.log(
                logging.ERROR if restart else logging.INFO,
                "%s ended: %s",
                self.child.name,
                reason,
                extra=_requests(board),
            )
            runtime.status_file(self.device, self.child.incarnation).unlink(missing_ok=True)
            runtime.socket_path(self.device, self.child.incarnation).unlink(missing_ok=True)
            if not restart:
                return
            if self.child.schedule(now, proven=board.ready):
                self._restart_reasons["hang" if self._hung else _kind_of_end(code)] += 1
            else:
                log.error("%s is given up: its restart budget is spent", self.child.name)
        elif self.child.running and not self._hung and self._is_hung(now):
            log.error("%s hangs: killing it", self.child.name)
            self._hung = True
            self.child.kill_soon()

    def start_if_due(self, runtime: RuntimeDir, now: float) -> None:
        """Start the first worker, or the next one when its pause is over."""
        if self.child.start_at is None or self.child.start_at > now:
            return
        self.child.incarnation += 1
        incarnation = self.child.incarnation
        self._board = WorkerStatusFile.create(runtime.status_file(self.device, incarnation))
        self._hung = False
        arguments = {
            "--runtime": str(runtime.path),
            "--device": self.device,
            "--incarnation": str(incarnation),
            "--threads": str(self._threads),
            "--parent": str(os.getpid()),
        }
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = dict.fromkeys(names, str(self._threads))
        self.child.start(
            [*self._command, *(word for pair in arguments.items() for word in pair)],
            now=now,
            environment=environment if self.device.startswith("cpu") else {},
        )

    def take_quarantined(self) -> list[str]:
        """Digests of inputs found guilty since the last call."""
        taken, self._quarantined = self._quarantined, []
        return taken

    def _is_hung(self, now: float) -> bool:
        board = self._board.read() if self._board is not None else None
        # Until it writes its board a worker is importing: the same patience as for a model.
        board = board or WorkerStatus(activity="load", since=self.child.started_at)
        return is_hung(
            board,
            now=now,
            floor_s=self._settings.hang_floor_s,
            factor=self._settings.hang_factor,
            load_timeout_s=LOAD_TIMEOUT_S,
        )

    def _learn(self, reason: str) -> WorkerStatus:
        """Read from the board who was on the device when the worker ended."""
        board = (self._board.read() if self._board is not None else None) or WorkerStatus()
        if self._board is not None:
            self._board.close()
            self._board = None
        # A job that was in a death before ran alone: there is no one else to blame for this one.
        self._quarantined += [job.digest for job in board.jobs if job.deaths > 0 and job.digest]
        self._proven.update(board.models)
        # A model that was warm here before is not what ended a worker that was killed while it
        # loaded it again.
        if board.activity == "load" and board.subject not in self._proven:
            self._load_deaths[board.subject] += 1
            if self._load_deaths[board.subject] >= _LOAD_DEATHS:
                self.refused_models.add(board.subject)
        death = WorkerExit(
            incarnation=self.child.incarnation,
            reason=reason,
            suspects=tuple(job.id for job in board.jobs),
        )
        self._deaths = (*self._deaths, death)[-MAX_EXITS:]
        return board


def _kind_of_end(code: int) -> str:
    """Why a process ended, as a label of few values."""
    if code == EXIT_DEVICE_LOST:
        return "device_lost"
    return "crash" if code < 0 else "exit"


def _requests(board: WorkerStatus) -> dict[str, object]:
    """Whose jobs were on the device: `extra` for the logger."""
    ids = tuple(dict.fromkeys(job.request_id for job in board.jobs if job.request_id))
    return {"fields": {"request_ids": ids}} if ids else {}
