"""A small record in a file that processes share: one writes it, any number read it without locks.

The file has two slots. A write goes to the slot that does not hold the newest record, and carries a
sequence number and a checksum; a reader takes the newest slot with a valid checksum. So a reader
never sees half a record, and a writer that is killed half-way leaves its former record readable.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Self

# Sequence number (0 = never written), length, checksum of everything else.
_HEADER = struct.Struct("<QII")
_SEQUENCE = struct.Struct("<Q")
_READ_ATTEMPTS = 8


class SharedRecord:
    """A mapped file that holds one record of bytes.

    Only one process may write; the file survives all of them.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._slot_size = len(self._map) // 2

    @classmethod
    def create(cls, path: Path, *, capacity: int) -> Self:
        """Make an empty record file for at most `capacity` bytes, readable by the owner only.

        Raises:
            FileExistsError: it exists; truncating a file that others have mapped would kill them.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, 2 * (capacity + _HEADER.size))
        finally:
            os.close(descriptor)
        return cls(path)

    @property
    def capacity(self) -> int:
        """Maximum size of a record in bytes."""
        return self._slot_size - _HEADER.size

    def write(self, record: bytes) -> None:
        """Replace the record.

        Raises:
            ValueError: it is longer than `capacity`.
        """
        if len(record) > self.capacity:
            raise ValueError(f"a record of {len(record)} bytes does not fit into {self.capacity}")
        sequence = max(self._sequences()) + 1
        start = (sequence % 2) * self._slot_size
        checksum = _checksum(sequence, record)
        self._map[start : start + _HEADER.size] = _HEADER.pack(sequence, len(record), checksum)
        body = start + _HEADER.size
        self._map[body : body + len(record)] = record

    def read(self) -> bytes | None:
        """The newest whole record; None if none was ever written."""
        # More than one attempt is needed only if two writes overtake this read.
        for _ in range(_READ_ATTEMPTS):
            sequences = self._sequences()
            newest = int(sequences[1] > sequences[0])
            for slot in (newest, 1 - newest):
                record = self._slot(slot * self._slot_size)
                if record is not None:
                    return record
        return None

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def _sequences(self) -> tuple[int, int]:
        return (
            _SEQUENCE.unpack_from(self._map, 0)[0],
            _SEQUENCE.unpack_from(self._map, self._slot_size)[0],
        )

    def _slot(self, start: int) -> bytes | None:
        sequence, length, checksum = _HEADER.unpack_from(self._map, start)
        if sequence == 0 or length > self.capacity:
            return None
        body = start + _HEADER.size
        record = self._map[body : body + length]
        return record if _checksum(sequence, record) == checksum else None


def _checksum(sequence: int, record: bytes) -> int:
    return zlib.crc32(record, zlib.crc32(_SEQUENCE.pack(sequence)))
