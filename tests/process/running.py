"""A supervisor in its own process, and access to its state for tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from service.devices.runtime_dir import RuntimeDir
from service.devices.socket_pool import SocketPool
from service.devices.status import DeviceStates, DeviceStatesFile, WorkerStatusFile
from service.settings import Settings
from tests.waiting import answers, until


def are_ready(pool: SocketPool) -> bool:
    """Whether every device is ready."""
    return all(device.state == "ready" for device in pool.devices())


def report(text: str) -> None:
    """Print a measurement; pytest shows it with -s and when a test fails."""
    sys.stdout.write(f"{text}\n")


class Service:
    """A supervisor in its own process, and access to its state."""

    def __init__(self, settings: Settings, folder: Path, *flags: str) -> None:
        command = [sys.executable, str(Path(__file__).parent / "run_service.py")]
        path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [*command, settings.model_dump_json(), *flags],
            env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.folder = folder
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        self.lines.extend(self.process.stderr)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def port(self) -> int:
        found = re.search(r'listening on http://[^ "]*:(\d+)"', self.log)
        return int(found[1]) if found else 0

    @property
    def runtime(self) -> RuntimeDir:
        (path,) = self.folder.glob("heatlens-*")
        return RuntimeDir(path)

    @property
    def states(self) -> DeviceStates:
        file = DeviceStatesFile.open(self.runtime.states_file)
        with contextlib.closing(file):
            return file.read() or DeviceStates()

    def status(self, device: str = "cpu"):
        state = next(state for state in self.states.devices if state.device == device)
        try:
            file = WorkerStatusFile.open(self.runtime.status_file(device, state.incarnation))
        except FileNotFoundError:
            return None
        with contextlib.closing(file):
            return file.read()

    def pids(self, text: str) -> list[int]:
        """Process ids of children with `text` in their command line."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children()
            return [c.pid for c in children if any(text in word for word in c.cmdline())]
        return []

    def workers(self) -> set[int]:
        """Process ids of the device workers, forked or not."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        return {p.pid for p in processes if p.name().startswith("worker ")}

    def worker_pid(self, device: str = "cpu") -> int:
        for pid in self.pids("faulty_worker"):
            line = psutil.Process(pid).cmdline()
            if line[line.index("--device") + 1] == device:
                return pid
        return 0

    def is_ready(self) -> bool:
        statuses = [self.status(state.device) for state in self.states.devices]
        return all(status is not None and status.ready for status in statuses)

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def answers(self) -> bool:
        return answers(self.url("/ready"))

    @contextlib.asynccontextmanager
    async def pool(self) -> AsyncIterator[SocketPool]:
        pool = SocketPool(self.runtime)
        await pool.start()
        try:
            yield pool
        finally:
            await pool.close()

    def release(self) -> None:
        """Let jobs that are held finish, now and later."""
        (self.runtime.path / "release").touch()

    def journal(self) -> list[list[str]]:
        """The job ids of each batch that ran."""
        path = self.runtime.path / "journal"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def wait_listening(self) -> None:
        """Wait until the port is known, or the process has ended."""
        until(lambda: self.port or self.process.poll() is not None)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(5)
            self.process.stderr.close()
