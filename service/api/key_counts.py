"""Counts the concurrent requests of each key across all HTTP processes.

Each process keeps its own counts in a record that the others read. A process counts a request first
and then looks at the sum, so that two requests that start at the same moment cannot both slip under
the limit.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from service.devices.shared_record import SharedRecord

_CAPACITY = 64 * 1024
_LIST_AGAIN_S = 0.2


class KeyCounts:
    """Requests in flight by key.

    Args:
        folder: the folder of all processes' records; None = this process is the only one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._name = str(os.getpid())
        self._own: Counter[str] = Counter()
        self._decoder = msgspec.msgpack.Decoder(dict[str, int])
        self._record: SharedRecord | None = None
        if folder is not None:
            self._record = SharedRecord.create(folder / self._name, capacity=_CAPACITY)
        self._others: dict[str, SharedRecord] = {}
        self._listed_at = float("-inf")

    @contextmanager
    def count(self, key: str) -> Iterator[int]:
        """Count a request while it is in flight; yields how many the key has, this one included."""
        try:
            self._add(key, 1)
            yield self._own[key] + self._elsewhere(key)
        finally:
            self._add(key, -1)

    def close(self) -> None:
        """Close the records of the other processes and remove the own one."""
        for record in self._others.values():
            record.close()
        self._others.clear()
        if self._record is not None and self._folder is not None:
            self._record.close()
            (self._folder / self._name).unlink(missing_ok=True)

    def _add(self, key: str, number: int) -> None:
        self._own[key] += number
        if self._own[key] == 0:
            del self._own[key]
        if self._record is not None:
            self._record.write(msgspec.msgpack.encode(self._own))

    def _elsewhere(self, key: str) -> int:
        if self._folder is None:
            return 0
        now = time.monotonic()
        if now - self._listed_at > _LIST_AGAIN_S:
            self._listed_at = now
            self._list_again(self._folder)
        found = (record.read() for record in self._others.values())
        return sum(self._decoder.decode(counts).get(key, 0) for counts in found if counts)

    def _list_again(self, folder: Path) -> None:
        """Open the records of new processes; close those of processes that have exited."""
        names = {path.name for path in folder.iterdir()} - {self._name}
        for name in self._others.keys() - names:
            self._others.pop(name).close()
        for name in names - self._others.keys():
            # The record may have been removed since, or not be complete yet.
            with suppress(OSError, ValueError):
                self._others[name] = SharedRecord(folder / name)
