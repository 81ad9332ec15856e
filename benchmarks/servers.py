"""Servers to measure: each in a process group of its own, on a free port of this machine, ended by process id."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]

_STOP_S = 20.0
_POLL_S = 0.1
_LOG_LINES = 15


class ServerFailed(RuntimeError):
    """A server did not start, or ended; the text holds the end of its log."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Usage:
    """What a server's processes hold and have used so far.

    Attributes:
        cpu_s: processor seconds by role: `http`, `device` and `other`; of peers all of it is
            `other`.
        rss_mb: resident megabytes of all processes, pages that several share counted in each.
        largest_mb: resident megabytes of the largest process of each role.
    """

    cpu_s: dict[str, float]
    rss_mb: float
    largest_mb: dict[str, float]

    @property
    def total_cpu_s(self) -> float:
        """Of all roles."""
        return sum(self.cpu_s.values())


class Server:
    """A server process and all that it starts. Use it as a context manager.

    Args:
        name: for messages.
        command: program and arguments.
        port: where it will listen.
        ready_path: answers 200 when it is ready.
        env: variables on top of this process's own.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        port: int,
        ready_path: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.port = port
        self._command = list(command)
        self._ready_path = ready_path
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the first process."""
        if self._process is None:
            raise ServerFailed(f"{self.name} is not started.")
        return self._process.pid

    def url(self, path: str = "") -> str:
        """URL of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def __enter__(self) -> Self:
        """Start it; `wait_ready` says when it can be used."""
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it, and whatever of its group outlives it."""
        self.stop()
        if self._log is not None:
            self._log.close()

    def stop(self) -> int | None:
        """Ask it to end, wait, then end it; gives its exit code."""
        process = self._process
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, see start_new_session
        return process.wait()

    def kill(self) -> None:
        """End it and all that it started, at once, as the loss of its machine would."""
        os.killpg(self.pid, signal.SIGKILL)  # its own group, see start_new_session
        if self._process is not None:
            self._process.wait()

    def wait_ready(self, *, timeout_s: float = 120.0) -> float:
        """Wait until it is ready; returns the seconds that took.

        Raises:
            ServerFailed: it ended, or was not ready in time.
        """
        begun = time.monotonic()
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while time.monotonic() - begun < timeout_s:
                if self._process is None or self._process.poll() is not None:
                    break
                with contextlib.suppress(httpx.TransportError):
                    if self._is_ready(client.get(self.url(self._ready_path))):
                        return time.monotonic() - begun
                time.sleep(_POLL_S)
        raise ServerFailed(f"{self.name} did not become ready.\n{self.log_end()}")

    def _is_ready(self, answer: httpx.Response) -> bool:
        if answer.status_code != 200:
            return False
        if "json" not in answer.headers.get("content-type", ""):
            return True
        body = answer.json()
        return not (isinstance(body, dict) and body.get("missing"))

    def log_end(self) -> str:
        """The last lines that it wrote."""
        if self._log is None:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        text = os.pread(self._log.fileno(), size, 0).decode(errors="replace")
        lines = text.splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def processes(self) -> list[psutil.Process]:
        """The first process and all its descendants."""
        try:
            first = psutil.Process(self.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def usage(self) -> Usage:
        """Sum up what the processes hold and have used."""
        cpu: dict[str, float] = {}
        largest: dict[str, float] = {}
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                role = role_of(process)
                times, memory = process.cpu_times(), process.memory_info().rss / 1e6
                cpu[role] = cpu.get(role, 0.0) + times.user + times.system
                largest[role] = max(largest.get(role, 0.0), memory)
                total += memory
        return Usage(cpu_s=cpu, rss_mb=total, largest_mb=largest)


def role_of(process: psutil.Process) -> str:
    """What a process of the service is for: `http`, `device` or `other`."""
    if "service.api.process" in process.cmdline():
        return "http"
    return "device" if process.name().startswith("worker ") else "other"


def heatlens(
    *,
    models: Sequence[Mapping[str, Any]] = (),
    name: str = "Heatlens",
    server: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Server:
    """The service itself, not started yet.

    Args:
        models: `[[models]]` entries; none is the embedded default model.
        name: for messages.
        server: flags of `heatlens serve` such as `{"devices": "cpu"}`.
        settings: other settings as in the environment, such as `{"LIMITS__MAX_WAIT_S": "1"}`.
    """
    port = free_port()
    flags = {"port": str(port), "log-level": "warning", **(server or {})}
    command = [sys.executable, "-m", "service", "serve"]
    for flag, value in flags.items():
        command += [f"--{flag}", value]
    env = {f"HEATLENS_{key}": value for key, value in (settings or {}).items()}
    if models:
        env["HEATLENS_MODELS"] = json.dumps(list(models))
    return Server(name, command, port=port, ready_path="/readyz", env=env)


def model_entry(name: str, *, precision: str = "fp32", runtime: str = "auto") -> dict[str, Any]:
    """A `[[models]]` entry: the embedded model by its name, another of torchvision with random weights."""
    entry = {"precision": precision, "runtime": runtime}
    if name == "efficientnet_lite0":
        return {"name": name, "source": f"embedded:{name}", **entry}
    source = name if ":" in name else f"torchvision:{name}"
    return {"name": source.rpartition(":")[2], "source": source, "weights": "none", **entry}
