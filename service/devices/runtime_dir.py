"""The private folder that the supervisor, HTTP processes and device workers share."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from models.catalog import ModelSpec
from service.configuration import ConfigurationSource
from service.settings import Settings

_SOCKET_PATH_LIMIT = 107
"""Maximum length of a Unix socket's path on Linux, in bytes."""


class RuntimeDir:
    """Paths of the files in the folder, and access to those that are read and written whole.

    The names of status files and sockets include the worker's incarnation: an old one is never
    mistaken for that of a new worker, and no file is rewritten while others have it mapped.

    Attributes:
        states_file: the states of all devices; see `DeviceStatesFile`.
        settings_file: the configuration in force.
        metrics_dir: folder in which HTTP processes keep their parts of the metrics.
        key_counts_dir: folder in which HTTP processes share the requests in flight of each key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.states_file = path / "devices"
        self.settings_file = path / "settings.json"
        self.metrics_dir = path / "metrics"
        self.key_counts_dir = path / "keys"

    @classmethod
    def create(cls) -> RuntimeDir:
        """Create the folder, accessible to this user only.

        Raises:
            OSError: the temporary folder's path is too long for a socket in it.
        """
        path = Path(tempfile.mkdtemp(prefix="heatlens-"))
        runtime = cls(path)
        if len(os.fsencode(runtime.socket_path("cuda:000", 1_000_000))) > _SOCKET_PATH_LIMIT:
            path.rmdir()
            raise OSError(f"{path} is too long for a Unix socket; set TMPDIR to a shorter path")
        for folder in (runtime.metrics_dir, runtime.key_counts_dir):
            folder.mkdir(mode=0o700)
        return runtime

    def forget_http(self, pid: int) -> None:
        """Remove the records of an HTTP process that has exited; its counters stay."""
        (self.key_counts_dir / str(pid)).unlink(missing_ok=True)
        for path in self.metrics_dir.glob(f"gauge_live*_{pid}.db"):
            path.unlink(missing_ok=True)

    def status_file(self, device: str, incarnation: int) -> Path:
        """The status of one worker process; see `WorkerStatusFile`."""
        return self.path / f"status-{_plain(device)}-{incarnation}"

    def socket_path(self, device: str, incarnation: int) -> Path:
        """The Unix socket of one worker process."""
        return self.path / f"worker-{_plain(device)}-{incarnation}"

    def socket_url(self, device: str, incarnation: int) -> str:
        """The ZeroMQ address of one worker process."""
        return f"ipc://{self.socket_path(device, incarnation)}"

    # ---------------------------------------------------------------- configuration

    def write_settings(self, settings: Settings) -> None:
        """Publish the configuration, including the hashes of keys."""
        _write(self.settings_file, settings.model_dump_json().encode())

    def read_settings(self) -> Settings:
        """The configuration in force."""
        return Settings.model_validate_json(self.settings_file.read_bytes())

    def write_source(self, source: ConfigurationSource) -> None:
        """Publish the source of the configuration."""
        _write(self.path / "source.json", source.model_dump_json().encode())

    def read_source(self) -> ConfigurationSource:
        """The source of the configuration, from which it can be read again."""
        return ConfigurationSource.model_validate_json((self.path / "source.json").read_bytes())

    def read_catalog(self) -> list[ModelSpec]:
        """The models that workers hold: the configured ones as changed by loads and unloads."""
        items = msgspec.json.decode((self.path / "catalog.json").read_bytes(), type=list[str])
        return [ModelSpec.model_validate_json(item) for item in items]

    def write_catalog(self, specs: Sequence[ModelSpec]) -> None:
        """Replace the catalog."""
        content = msgspec.json.encode([spec.model_dump_json() for spec in specs])
        _write(self.path / "catalog.json", content)

    def change_catalog(self, change: Callable[[list[ModelSpec]], list[ModelSpec]]) -> None:
        """Read, change and replace the catalog as one atomic step; blocks for milliseconds."""
        descriptor = os.open(self.path / "catalog.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self.write_catalog(change(self.read_catalog()))
        finally:
            # Releases the lock.
            os.close(descriptor)


class SettingsLease:
    """The configuration that a process uses, with a lock that tells the others so.

    Each HTTP process holds a shared lock on its version of the settings file until its last request
    under that version has finished. Locks end with their process, so the others can wait for a
    version to be unused without counting processes.

    Raises:
        OSError: the file does not exist.
        ValueError: it does not hold settings.
    """

    def __init__(self, runtime: RuntimeDir) -> None:
        self._path = runtime.settings_file
        while True:
            self._descriptor = os.open(self._path, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            if self.is_current():
                break
            # It was replaced between opening and locking.
            os.close(self._descriptor)
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            self.settings = Settings.model_validate_json(file.read())

    def is_current(self) -> bool:
        """Whether the configuration has not been replaced since."""
        own, published = os.fstat(self._descriptor), self._path.stat()
        return (own.st_dev, own.st_ino) == (published.st_dev, published.st_ino)

    def is_last(self) -> bool:
        """Whether all other processes have released this version."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


def holds(spec: ModelSpec, device: str) -> bool:
    """Whether a device holds a model, by its name or its kind (`cpu` stands for any `cpu:N`)."""
    kind = device.split(":", maxsplit=1)[0]
    return spec.devices is None or not {device, kind}.isdisjoint(spec.devices)


def _plain(device: str) -> str:
    return device.replace(":", "-")


def _write(path: Path, content: bytes) -> None:
    """Replace a file atomically: readers see either the old or the new content."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    Path(temporary).replace(path)
