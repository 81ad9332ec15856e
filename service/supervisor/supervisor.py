"""The supervisor: owns the listening socket and starts, watches and restarts all processes."""

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
from service.devices.status import DeviceStates, DeviceStatesFile
from service.hardware import available_cores, resolve_devices, threads_per_device
from service.logs import configure_logging
from service.settings import Settings
from service.supervisor.child import Child, Command, Starter
from service.supervisor.device_process import DeviceProcess, Quarantine
from service.supervisor.fork_server import ForkServer
from service.supervisor.http_process import HttpProcess

log = logging.getLogger("heatlens.supervisor")

# -P: a `models.py` or `service.py` in the working folder must not shadow our packages.
WORKER_COMMAND = (sys.executable, "-P", "-m", "service.worker.process")
FORK_SERVER_COMMAND = (sys.executable, "-P", "-m", "service.worker.fork_server")
HTTP_COMMAND = (sys.executable, "-P", "-m", "service.api.process")

_TICK_S = 0.05
_BACKLOG = 2048
_WORKER_STOP_S = 5.0


class _Phase(Enum):
    """HTTP processes finish their requests while draining; then workers stop."""

    SERVING = "serving"
    DRAINING = "draining"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Supervisor:
    """Runs the service until it is told to stop.

    SIGTERM or SIGINT: readiness ends, accepted requests finish or expire within the grace period,
    and the exit code is 0. A second signal stops at once. SIGHUP: one HTTP process reloads the
    configuration for all; see `service.api.reload`. When the restart budget of all devices, or of
    all HTTP processes, is spent, everything is stopped and the exit code is 1.

    Args:
        settings: the configuration.
        source: the place to read the configuration again; None = the environment only.
        worker_command: program and first arguments of a device worker; None = the real one, forked
            where that is possible.
        http_command: the same for an HTTP process.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        source: ConfigurationSource | None = None,
        worker_command: Sequence[str] | None = None,
        http_command: Sequence[str] = HTTP_COMMAND,
    ) -> None:
        self._settings = settings
        self._source = source or ConfigurationSource()
        self._worker_command = worker_command
        self._http_command = http_command
        self._devices: list[DeviceProcess] = []
        self._http: list[HttpProcess] = []
        self._phase = _Phase.SERVING
        self._phase_ends = 0.0
        self._exit_code = 0
        self._signals = 0
        self._reload_requested = False
        self._quarantine = Quarantine(settings.workers.quarantine_s)
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
            # A traceback would add nothing.
            log.error("cannot listen: %s", error.strerror)  # noqa: TRY400
            return 1
        runtime = RuntimeDir.create()
        self._fork_server = ForkServer([*FORK_SERVER_COMMAND, "--runtime", str(runtime.path)])
        try:
            with contextlib.closing(listener), _wakeups() as wakeups:
                self._prepare(runtime, listener)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, self._count_signal)
                signal.signal(signal.SIGHUP, self._request_reload)
                while self._phase is not _Phase.STOPPED:
                    self._tick(time.monotonic())
                    select.select([wakeups, *self._fork_server.descriptors()], [], [], _TICK_S)
                    with contextlib.suppress(BlockingIOError):
                        os.read(wakeups, 4096)
        finally:
            for child in self._children():
                child.kill()
            self._fork_server.kill()
            shutil.rmtree(runtime.path, ignore_errors=True)
        return self._exit_code

    def _prepare(self, runtime: RuntimeDir, listener: socket.socket) -> None:
        self._runtime, self._listener = runtime, listener
        settings = self._settings
        runtime.write_settings(settings)
        runtime.write_source(self._source)
        runtime.write_catalog(settings.models)
        cores = available_cores()
        devices = resolve_devices(settings.server.devices, cores=cores)
        threads = settings.workers.threads or threads_per_device(devices, cores=cores)
        for device in devices:
            child = self._child(f"device worker {device}", self._worker_starter(device))
            self._devices.append(
                DeviceProcess(
                    device, child, settings=settings.workers, runtime=runtime, threads=threads
                )
            )
        for index in range(settings.server.http_worker_count()):
            command = Command(self._http_command, inherit=[listener.fileno()])
            child = self._child(f"HTTP process {index}", command)
            self._http.append(HttpProcess(child, runtime=runtime, listener=listener.fileno()))
        self._states_file = DeviceStatesFile.create(runtime.states_file)
        self._publish()
        host, port = listener.getsockname()[:2]
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if not settings.security.api_keys and not ipaddress.ip_address(host).is_loopback:
            log.warning(
                "NO API KEY IS CONFIGURED: anyone who can reach %s can use the service; set "
                "security.api_keys, and security.require_keys to never start without",
                host,
            )

    def _worker_starter(self, device: str) -> Starter:
        if self._worker_command is not None:
            return Command(self._worker_command)
        # Only Linux ends a fork with its parent, and libraries of other systems may not survive a fork.
        # On a GPU it was never tried.
        is_forked = sys.platform == "linux" and device.startswith("cpu")
        return self._fork_server if is_forked else Command(WORKER_COMMAND)

    def _child(self, name: str, starter: Starter) -> Child:
        return Child(name, starter=starter, settings=self._settings.workers)

    # ---------------------------------------------------------------- the loop

    def _tick(self, now: float) -> None:
        self._handle_signals(now)
        for device in self._devices:
            device.poll(now, restart=self._phase is not _Phase.STOPPING)
        self._find_quarantined(now)
        # Clients see the exit of a worker before they can see its successor.
        self._publish()
        for device in self._devices:
            device.start_if_due(now)
        self._publish()
        serving = self._phase is _Phase.SERVING
        for http in self._http:
            http.poll(now, restart=serving)
        if serving and self._reload_requested:
            self._forward_reload()
        if serving and self._is_hopeless():
            self._exit_code = 1
            self._drain(now)
        self._advance(now)

    def _forward_reload(self) -> None:
        """Let one HTTP process reload the configuration, as soon as one runs."""
        running = [process.child for process in self._http if process.child.running]
        if running:
            self._reload_requested = False
            running[0].signal(signal.SIGHUP)

    def _is_hopeless(self) -> bool:
        devices = all(device.child.given_up for device in self._devices)
        if devices:
            log.error("the restart budget of every device is spent: stopping")
        http = all(process.child.given_up for process in self._http)
        if http:
            log.error("the restart budget of every HTTP process is spent: stopping")
        return devices or http

    # ---------------------------------------------------------------- stopping

    def _count_signal(self, *_: object) -> None:
        self._signals += 1

    def _request_reload(self, *_: object) -> None:
        self._reload_requested = True

    def _handle_signals(self, now: float) -> None:
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
        # New connections are refused once the HTTP processes have closed their copies as well.
        self._listener.close()
        for process in self._http:
            process.stop()

    @property
    def _grace_s(self) -> float:
        """The grace period of the configuration in force, which may have been reloaded."""
        return self._runtime.read_settings().server.grace_s

    def _advance(self, now: float) -> None:
        """Move to the next phase once the processes of this phase have exited or its time is up."""
        late = now >= self._phase_ends
        if self._phase is _Phase.DRAINING:
            serving = [process.child for process in self._http]
            for child in serving if late else ():
                child.kill()
            if not any(child.running for child in serving):
                self._phase, self._phase_ends = _Phase.STOPPING, now + _WORKER_STOP_S
                for device in self._devices:
                    device.child.signal(signal.SIGTERM)
        elif self._phase is _Phase.STOPPING:
            ended = not any(device.child.running for device in self._devices)
            self._phase = _Phase.STOPPED if ended or late else _Phase.STOPPING

    # ---------------------------------------------------------------- records

    def _find_quarantined(self, now: float) -> None:
        for device in self._devices:
            for digest in device.take_quarantined():
                log.error("quarantined a job that was part of two worker exits: %s", digest)
                self._quarantine.add(digest, now)

    def _publish(self) -> None:
        states = DeviceStates(
            devices=tuple(device.state() for device in self._devices),
            draining=self._phase is not _Phase.SERVING,
            quarantined=self._quarantine.digests(time.monotonic()),
            refused_models=tuple(
                sorted({m for device in self._devices for m in device.refused_models})
            ),
        )
        if states != self._published:
            self._states_file.write(states)
            self._published = states

    def _children(self) -> list[Child]:
        return [*(p.child for p in self._http), *(d.child for d in self._devices)]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def _wakeups() -> Iterator[int]:
    """A descriptor that becomes readable on each signal, including the exit of a child."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Without a handler nothing is written.
    on_child = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGCHLD, on_child)
        os.close(reader)
        os.close(writer)
