"""The private folder through which supervisor, HTTP processes and device workers find each other."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from models.catalog import ModelSpec
from service.configuration import ConfigurationSource
from service.settings import Settings

_SOCKET_PATH_LIMIT = 107  # bytes of a Unix socket's address on Linux


class RuntimeDir:
    """Names of the files in the folder, and the two that are read and written whole.

    Board and socket carry the incarnation in their names: whoever holds an old one can never
    mistake a new worker for it, and no file is rewritten while others have it mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls) -> RuntimeDir:
        """Make the folder, open to this user only.

        Raises:
            OSError: the temporary folder's path is too long for a socket in it.
        """
        path = Path(tempfile.mkdtemp(prefix="heatlens-"))  # mkdtemp makes it 0700
        runtime = cls(path)
        if len(os.fsencode(runtime.socket_path("cuda:000", 1_000_000))) > _SOCKET_PATH_LIMIT:
            path.rmdir()
            raise OSError(f"{path} is too long for a Unix socket; set TMPDIR to a shorter path")
        for folder in (runtime.metrics_dir, runtime.limiter_dir):
            folder.mkdir(mode=0o700)
        return runtime

    @property
    def states_file(self) -> Path:
        """The record of all devices; see `fleet.py`."""
        return self.path / "fleet"

    @property
    def metrics_dir(self) -> Path:
        """Where HTTP processes keep their shares of the metrics."""
        return self.path / "metrics"

    @property
    def limiter_dir(self) -> Path:
        """Where HTTP processes say how many requests of each key they have; see `concurrency.py`."""
        return self.path / "limiter"

    def http_file(self, pid: int) -> Path:
        """What an HTTP process makes once it serves."""
        return self.path / f"http-{pid}"

    def forget_http(self, pid: int) -> None:
        """Drop what an HTTP process that has ended said of the moment; its counters stay."""
        self.http_file(pid).unlink(missing_ok=True)
        (self.limiter_dir / str(pid)).unlink(missing_ok=True)
        for path in self.metrics_dir.glob(f"gauge_live*_{pid}.db"):
            path.unlink(missing_ok=True)

    def status_file(self, device: str, incarnation: int) -> Path:
        """The board of one worker process; see `board.py`."""
        return self.path / f"board-{_plain(device)}-{incarnation}"

    def socket_path(self, device: str, incarnation: int) -> Path:
        """The Unix socket of one worker process."""
        return self.path / f"worker-{_plain(device)}-{incarnation}"

    def socket_url(self, device: str, incarnation: int) -> str:
        """The same as a ZeroMQ address."""
        return f"ipc://{self.socket_path(device, incarnation)}"

    def write_settings(self, settings: Settings) -> None:
        """Publish the configuration, with the hashes of keys in it."""
        _write(self.path / "settings.json", settings.model_dump_json().encode())

    def read_settings(self) -> Settings:
        """The configuration as the supervisor published it."""
        return Settings.model_validate_json((self.path / "settings.json").read_bytes())

    def write_source(self, source: ConfigurationSource) -> None:
        """Publish where the configuration can be read again."""
        _write(self.path / "source.json", source.model_dump_json().encode())

    def read_source(self) -> ConfigurationSource:
        """Where the configuration can be read again."""
        return ConfigurationSource.model_validate_json((self.path / "source.json").read_bytes())

    def read_catalog(self) -> list[ModelSpec]:
        """The models that workers are to hold: the configured ones, and what was loaded and unloaded since."""
        return _read_specs(self.path / "catalog.json")

    def write_catalog(self, specs: Sequence[ModelSpec]) -> None:
        """Replace the catalog."""
        _write_specs(self.path / "catalog.json", specs)

    def read_wanted(self) -> list[ModelSpec]:
        """The models that a reload is to end with."""
        return _read_specs(self.path / "wanted.json")

    def write_wanted(self, specs: Sequence[ModelSpec]) -> None:
        """Say with which models a reload is to end."""
        _write_specs(self.path / "wanted.json", specs)

    def change_catalog(self, change: Callable[[list[ModelSpec]], list[ModelSpec]]) -> None:
        """Read, change and replace the catalog as one step among all processes; blocks for milliseconds."""
        descriptor = os.open(self.path / "catalog.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self.write_catalog(change(self.read_catalog()))
        finally:
            os.close(descriptor)  # gives the lock back


def holds(spec: ModelSpec, device: str) -> bool:
    """Whether a device is to hold a model: it is named, or its kind is (`cpu` means every `cpu:N`)."""
    return spec.devices is None or bool(
        {device, device.split(":", maxsplit=1)[0]} & set(spec.devices)
    )


def _plain(device: str) -> str:
    return device.replace(":", "-")


def _read_specs(path: Path) -> list[ModelSpec]:
    items = msgspec.json.decode(path.read_bytes(), type=list[str])
    return [ModelSpec.model_validate_json(item) for item in items]


def _write_specs(path: Path, specs: Sequence[ModelSpec]) -> None:
    _write(path, msgspec.json.encode([spec.model_dump_json() for spec in specs]))


def _write(path: Path, content: bytes) -> None:
    """Replace a file at once: readers see the old or the new content."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    Path(temporary).replace(path)


# ---------------------------------------------------------------- lifeline


_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere only check the parent now).

    Args:
        parent_pid: who must be the parent; if it no longer is, the process ends at once.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl failed")
    if os.getppid() != parent_pid:  # it died before the kernel was told
        os._exit(1)
