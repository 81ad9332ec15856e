"""The supervisor: owns the listening socket, and starts, watches and restarts all other processes. No torch."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from enum import Enum

from service.cores import available_cores
from service.logs import configure_logging
from service.settings import Settings
from service.workers.child import Child, RestartBudget, describe_end
from service.workers.device_slot import DeviceSlot
from service.workers.devices import resolve_devices, threads_per_device
from service.workers.fleet import MAX_QUARANTINED, Fleet, FleetFile
from service.workers.runtime import RuntimeDir

log = logging.getLogger("heatlens.supervisor")

WORKER_COMMAND = (sys.executable, "-m", "service.workers.worker")
HTTP_COMMAND = (sys.executable, "-m", "service.workers.http_process")

_TICK_S = 0.05
_BACKLOG = 2048
_WORKER_STOP_S = 5.0
_PROVEN_S = 5.0


class _Phase(Enum):
    SERVING = "serving"
    DRAINING = "draining"  # HTTP processes finish what they have
    STOPPING = "stopping"  # workers end
    STOPPED = "stopped"


class Supervisor:
    """Runs the service until it is told to stop.

    SIGTERM or SIGINT: no longer ready at once, requests that were accepted finish or expire within the grace, exit
    code 0. A second signal stops at once. When no device, or no HTTP process, is left within its restart budget,
    everything is stopped and the exit code is 1.

    Args:
        settings: the configuration.
        worker_command: program and first arguments of a device worker.
        http_command: the same of an HTTP process.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        worker_command: Sequence[str] = WORKER_COMMAND,
        http_command: Sequence[str] = HTTP_COMMAND,
    ) -> None:
        self._settings = settings
        self._http_command = tuple(http_command)
        cores = available_cores()
        devices = resolve_devices(settings.server.devices, cores=cores)
        threads = settings.workers.threads or threads_per_device(devices, cores=cores)
        self._slots = [
            DeviceSlot(device, settings=settings.workers, command=worker_command, threads=threads)
            for device in devices
        ]
        self._http = [
            Child(name=f"HTTP process {index}", budget=self._budget())
            for index in range(settings.server.http_worker_count())
        ]
        self._phase = _Phase.SERVING
        self._phase_ends = 0.0
        self._exit_code = 0
        self._signals = 0
        self._quarantined: tuple[str, ...] = ()
        self._published: Fleet | None = None

    def run(self) -> int:
        """Run the service in this thread, which must be the main one; returns the exit code."""
        configure_logging(self._settings.server.log_level)
        try:
            listener = _listen(self._settings.server.host, self._settings.server.port)
        except OSError as error:
            log.error("cannot listen: %s", error.strerror)  # noqa: TRY400  # the trace adds nothing
            return 1
        runtime = RuntimeDir.create()
        try:
            with contextlib.closing(listener), _wakeups() as wakeups:
                self._prepare(runtime, listener)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, self._count_signal)
                while self._phase is not _Phase.STOPPED:
                    self._tick(time.monotonic())
                    select.select([wakeups], [], [], _TICK_S)
                    with contextlib.suppress(BlockingIOError):
                        os.read(wakeups, 4096)
        finally:
            for child in self._children():
                child.kill()
            shutil.rmtree(runtime.path, ignore_errors=True)
        return self._exit_code

    def _prepare(self, runtime: RuntimeDir, listener: socket.socket) -> None:
        self._runtime, self._listener = runtime, listener
        runtime.write_settings(self._settings)
        runtime.write_catalog(self._settings.models)
        self._fleet_file = FleetFile.create(runtime.fleet_file)
        self._publish()
        host, port = listener.getsockname()[:2]
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if not self._settings.security.api_keys and not ipaddress.ip_address(host).is_loopback:
            log.warning("anyone who reaches %s may use the service: no API key is configured", host)

    # ---------------------------------------------------------------- the loop

    def _tick(self, now: float) -> None:
        self._obey_signals(now)
        for slot in self._slots:
            slot.tend(self._runtime, now, restart=self._phase is not _Phase.STOPPING)
        self._quarantine()
        self._publish()  # before clients can see a new worker, they see how the old one ended
        for slot in self._slots:
            slot.start_if_due(self._runtime, now)
        self._publish()
        for child in self._http:
            self._tend_http(child, now)
        if self._phase is _Phase.SERVING and self._is_hopeless():
            self._exit_code = 1
            self._drain(now)
        self._go_on(now)

    def _tend_http(self, child: Child, now: float) -> None:
        pid = child.pid
        code = child.reap()
        if code is not None and pid is not None:
            log.info("%s ended: %s", child.name, describe_end(code))
            self._forget_metrics(pid)
            proven = now - child.started_at > _PROVEN_S
            if self._phase is _Phase.SERVING and not child.schedule(now, proven=proven):
                log.error("%s is given up: its restart budget is spent", child.name)
        due = child.start_at is not None and child.start_at <= now
        if due and self._phase is _Phase.SERVING:
            self._start_http(child, now)

    def _start_http(self, child: Child, now: float) -> None:
        child.incarnation += 1
        arguments = {
            "--runtime": str(self._runtime.path),
            "--socket": str(self._listener.fileno()),
            "--parent": str(os.getpid()),
        }
        child.start(
            [*self._http_command, *(word for pair in arguments.items() for word in pair)],
            now=now,
            environment={
                "PROMETHEUS_MULTIPROC_DIR": str(self._runtime.metrics_dir),
                "OPENBLAS_NUM_THREADS": "1",  # each thread of a BLAS nobody calls costs memory
            },
            inherit=[self._listener.fileno()],
        )

    def _is_hopeless(self) -> bool:
        devices = all(slot.child.given_up for slot in self._slots)
        if devices:
            log.error("no device is left within its restart budget: stopping")
        return devices or any(child.given_up for child in self._http)

    # ---------------------------------------------------------------- stopping

    def _count_signal(self, *_: object) -> None:
        self._signals += 1

    def _obey_signals(self, now: float) -> None:
        if self._signals and self._phase is _Phase.SERVING:
            log.info("stopping: accepted requests have %g s", self._settings.server.grace_s)
            self._drain(now)
            self._signals = 1
        elif self._signals > 1:
            log.warning("stopping at once")
            self._exit_code = 1
            self._phase = _Phase.STOPPED

    def _drain(self, now: float) -> None:
        self._phase = _Phase.DRAINING
        self._phase_ends = now + self._settings.server.grace_s + 1
        self._publish()
        self._listener.close()  # new connections are refused once the HTTP processes have closed theirs
        for child in self._http:
            child.signal(signal.SIGTERM)

    def _go_on(self, now: float) -> None:
        """Move to the next phase once this one's processes have ended, or its time is up."""
        late = now >= self._phase_ends
        if self._phase is _Phase.DRAINING:
            for child in self._http if late else ():
                child.kill()
            if not any(child.running for child in self._http):
                self._phase, self._phase_ends = _Phase.STOPPING, now + _WORKER_STOP_S
                for slot in self._slots:
                    slot.child.signal(signal.SIGTERM)
        elif self._phase is _Phase.STOPPING:
            ended = not any(slot.child.running for slot in self._slots)
            self._phase = _Phase.STOPPED if ended or late else _Phase.STOPPING

    # ---------------------------------------------------------------- records

    def _quarantine(self) -> None:
        """Never run again what was on a device in two deaths."""
        for slot in self._slots:
            for digest in slot.take_quarantined():
                log.error("an input was on a device in two deaths and is quarantined: %s", digest)
                others = tuple(d for d in self._quarantined if d != digest)
                self._quarantined = (*others, digest)[-MAX_QUARANTINED:]

    def _publish(self) -> None:
        fleet = Fleet(
            devices=tuple(slot.life() for slot in self._slots),
            draining=self._phase is not _Phase.SERVING,
            quarantined=self._quarantined,
            refused_models=tuple(sorted({m for slot in self._slots for m in slot.refused_models})),
        )
        if fleet != self._published:
            self._fleet_file.write(fleet)
            self._published = fleet

    def _forget_metrics(self, pid: int) -> None:
        """Drop the live gauges of an HTTP process that has ended; its counters stay."""
        for path in self._runtime.metrics_dir.glob(f"gauge_live*_{pid}.db"):
            path.unlink(missing_ok=True)

    def _budget(self) -> RestartBudget:
        workers = self._settings.workers
        return RestartBudget(restarts=workers.restarts, window_s=workers.restart_window_s)

    def _children(self) -> list[Child]:
        return [*self._http, *(slot.child for slot in self._slots)]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def _wakeups() -> Iterator[int]:
    """A descriptor that becomes readable when a signal arrives, the end of a child included."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    on_child = signal.signal(
        signal.SIGCHLD, lambda *_: None
    )  # without a handler nothing is written
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGCHLD, on_child)
        os.close(reader)
        os.close(writer)
