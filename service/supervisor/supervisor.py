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

from service import tracing
from service.configuration import ConfigurationSource
from service.devices.runtime_dir import RuntimeDir
from service.devices.status import MAX_QUARANTINED, DeviceStates, DeviceStatesFile
from service.hardware import available_cores, resolve_devices, threads_per_device
from service.logs import configure_logging
from service.settings import Settings
from service.supervisor.child import Child
from service.supervisor.device_process import DeviceProcess
from service.supervisor.http_process import HttpLaunch, HttpProcess
from service.supervisor.reload import Reload

log = logging.getLogger("heatlens.supervisor")

WORKER_COMMAND = (sys.executable, "-m", "service.worker.process")
HTTP_COMMAND = (sys.executable, "-m", "service.api.process")

_TICK_S = 0.05
_BACKLOG = 2048
_WORKER_STOP_S = 5.0


class _Phase(Enum):
    SERVING = "serving"
    DRAINING = "draining"  # HTTP processes finish what they have
    STOPPING = "stopping"  # workers end
    STOPPED = "stopped"


class Supervisor:
    """Runs the service until it is told to stop.

    SIGTERM or SIGINT: no longer ready at once, requests that were accepted finish or expire within
    the grace, exit code 0. A second signal stops at once. SIGHUP: the configuration is read again
    and taken over; see `Reload`. When no device, or no HTTP process, is left within its restart
    budget, everything is stopped and the exit code is 1.

    Args:
        settings: the configuration.
        source: where that can be read again; None = the environment only.
        worker_command: program and first arguments of a device worker.
        http_command: the same of an HTTP process.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        source: ConfigurationSource | None = None,
        worker_command: Sequence[str] = WORKER_COMMAND,
        http_command: Sequence[str] = HTTP_COMMAND,
    ) -> None:
        self._settings = settings
        self._source = source or ConfigurationSource()
        self._http_command = tuple(http_command)
        cores = available_cores()
        devices = resolve_devices(settings.server.devices, cores=cores)
        threads = settings.workers.threads or threads_per_device(devices, cores=cores)
        self._slots = [
            DeviceProcess(
                device, settings=settings.workers, command=worker_command, threads=threads
            )
            for device in devices
        ]
        self._http = [
            HttpProcess(index, settings.workers)
            for index in range(settings.server.http_worker_count())
        ]
        self._phase = _Phase.SERVING
        self._phase_ends = 0.0
        self._exit_code = 0
        self._signals = 0
        self._reload_wanted = False
        self._quarantined: tuple[str, ...] = ()
        self._published: DeviceStates | None = None

    def run(self) -> int:
        """Run the service in this thread, which must be the main one; returns the exit code."""
        configure_logging(self._settings.server.log_level)
        if tracing.is_on(self._settings.tracing) and not tracing.is_installed():
            log.error(tracing.EXTRA_MISSING)
            return 1
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
                signal.signal(signal.SIGHUP, self._want_reload)
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
        self._launch = HttpLaunch(self._http_command, runtime, listener.fileno())
        self._reload = Reload(
            self._settings, source=self._source, launch=self._launch, slots=self._http
        )
        runtime.write_settings(self._settings)
        runtime.write_source(self._source)
        runtime.write_catalog(self._settings.models)
        self._fleet_file = DeviceStatesFile.create(runtime.states_file)
        self._publish()
        host, port = listener.getsockname()[:2]
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if not self._settings.security.api_keys and not ipaddress.ip_address(host).is_loopback:
            log.warning("anyone who reaches %s may use the service: no API key is configured", host)

    # ---------------------------------------------------------------- the loop

    def _tick(self, now: float) -> None:
        self._obey_signals(now)
        for slot in self._slots:
            slot.poll(self._runtime, now, restart=self._phase is not _Phase.STOPPING)
        self._quarantine()
        self._publish()  # before clients can see a new worker, they see how the old one ended
        for slot in self._slots:
            slot.start_if_due(self._runtime, now)
        self._publish()
        serving = self._phase is _Phase.SERVING
        for http in self._http:
            http.poll(self._launch, now, restart=serving)
        if serving:
            self._tick_reload(now)
        if serving and self._is_hopeless():
            self._exit_code = 1
            self._drain(now)
        self._advance(now)

    def _tick_reload(self, now: float) -> None:
        if self._reload_wanted and not self._reload.busy:
            self._reload_wanted = False
            self._reload.begin(now)
        self._reload.tick(now)

    def _is_hopeless(self) -> bool:
        devices = all(slot.child.given_up for slot in self._slots)
        if devices:
            log.error("no device is left within its restart budget: stopping")
        return devices or any(slot.child.given_up for slot in self._http)

    # ---------------------------------------------------------------- stopping

    def _count_signal(self, *_: object) -> None:
        self._signals += 1

    def _want_reload(self, *_: object) -> None:
        self._reload_wanted = True

    def _obey_signals(self, now: float) -> None:
        if self._signals and self._phase is _Phase.SERVING:
            log.info("stopping: accepted requests have %g s", self._grace_s)
            self._drain(now)
            self._signals = 1
        elif self._signals > 1:
            log.warning("stopping at once")
            self._exit_code = 1
            self._phase = _Phase.STOPPED

    def _drain(self, now: float) -> None:
        self._phase = _Phase.DRAINING
        self._phase_ends = now + self._grace_s + 1
        self._publish()
        self._listener.close()  # new connections are refused once the HTTP processes have closed theirs
        for slot in self._http:
            slot.stop()

    @property
    def _grace_s(self) -> float:
        return self._reload.settings.server.grace_s

    def _advance(self, now: float) -> None:
        """Move to the next phase once this one's processes have ended, or its time is up."""
        late = now >= self._phase_ends
        if self._phase is _Phase.DRAINING:
            serving = [child for slot in self._http for child in slot.children()]
            for child in serving if late else ():
                child.kill()
            if not any(child.running for child in serving):
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
        fleet = DeviceStates(
            devices=tuple(slot.life() for slot in self._slots),
            draining=self._phase is not _Phase.SERVING,
            quarantined=self._quarantined,
            refused_models=tuple(sorted({m for slot in self._slots for m in slot.refused_models})),
        )
        if fleet != self._published:
            self._fleet_file.write(fleet)
            self._published = fleet

    def _children(self) -> list[Child]:
        http = [child for slot in self._http for child in slot.children()]
        return [*http, *self._reload.children(), *(slot.child for slot in self._slots)]


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
