"""What the supervisor knows of all devices, for everyone to read: one record in one file.

A record, not messages: a process that starts late or was busy reads the same truth as the others,
and there is nothing that it could have missed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from models.types import Struct
from service.workers.shared_record import SharedRecord

_CAPACITY = 512 * 1024

MAX_DEATHS = 8
MAX_QUARANTINED = 1024

Life = Literal["up", "down", "given_up"]


class Death(Struct):
    """How one incarnation of a worker ended.

    Attributes:
        suspects: ids of the jobs that were on the device.
    """

    incarnation: int
    reason: str
    suspects: tuple[str, ...] = ()


class DeviceLife(Struct):
    """One device worker as a process.

    Attributes:
        incarnation: number of the process that is running, or ran last; 0 = none yet.
        life: `down` while a restart is due, `given_up` when the restart budget is spent.
        restarts: times it was started again.
        restart_reasons: the same by why it had ended: `hang`, `device_lost`, `crash` (a signal),
            `exit`.
        deaths: the last few, oldest first.
    """

    device: str
    incarnation: int = 0
    life: Life = "down"
    restarts: int = 0
    restart_reasons: dict[str, int] = {}
    deaths: tuple[Death, ...] = ()


class Fleet(Struct):
    """Every device, and what concerns all.

    Attributes:
        draining: whether the service is stopping.
        quarantined: digests of inputs that were on the device in two deaths, oldest first.
        refused_models: `name@version` of models whose loading killed workers; not to be tried
            again.
    """

    devices: tuple[DeviceLife, ...] = ()
    draining: bool = False
    quarantined: tuple[str, ...] = ()
    refused_models: tuple[str, ...] = ()


class FleetFile:
    """The fleet in a file: written by the supervisor, polled by everyone."""

    def __init__(self, record: SharedRecord) -> None:
        self._record = record
        self._decoder = msgspec.msgpack.Decoder(Fleet)
        self._seen = -1
        self._fleet = Fleet()

    @classmethod
    def create(cls, path: Path) -> FleetFile:
        """Make the file, with nothing in it."""
        return cls(SharedRecord.create(path, capacity=_CAPACITY))

    @classmethod
    def open(cls, path: Path) -> FleetFile:
        """Map a file that exists."""
        return cls(SharedRecord(path))

    def write(self, fleet: Fleet) -> None:
        """Replace the record."""
        self._record.write(msgspec.msgpack.encode(fleet))

    def read(self) -> Fleet:
        """The current record; decoded only when it has changed."""
        version = self._record.version()
        if version != self._seen:
            record = self._record.read()
            if record is not None:
                self._fleet = self._decoder.decode(record)
                self._seen = version
        return self._fleet

    def close(self) -> None:
        """Unmap the file."""
        self._record.close()
