"""Functions whose work on a device is recorded once and then replayed with a single launch."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

logger = logging.getLogger("heatlens.engine")

Function = Callable[..., tuple[Tensor, ...]]
"""Takes and returns tensors of one row for each image; rows do not depend on each other."""
Work = Callable[[], tuple[Tensor, ...]]
Record = Callable[[Work], Work]
"""Records what work does to the device; the result does it again into the same tensors."""

MOST = 32
PATIENCE = 2
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest difference of a replay from the plain call, relative to the largest value."""


@dataclass
class _Recording:
    """Recorded work, and the memory that it reads from."""

    buffers: tuple[Tensor, ...]
    replay: Work

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs for n rows; the other rows of the buffers make no difference."""
        count = len(inputs[0])
        for buffer, tensor in zip(self.buffers, inputs, strict=True):
            buffer[:count].copy_(tensor, non_blocking=True)
        return tuple(output[:count] for output in self.replay())


@dataclass
class _Slot:
    """A key's recording, and how often the key was met before it was recorded."""

    met: int = 0
    recording: _Recording | None = None


class Graphs:
    """Recordings by key, the least recently used dropped first.

    A key is recorded when it is met for the third time while it is still remembered: recording
    takes as long as many passes, and in very mixed traffic most keys do not come again soon. What
    fails to be recorded or replayed, or gives something else than the plain call, is not tried
    again.
    """

    def __init__(
        self, record: Record, *, dtype: torch.dtype, most: int = MOST, patience: int = PATIENCE
    ) -> None:
        """Remember at most `most` keys; compare replays in `dtype`'s precision."""
        self._record_work = record
        self._tolerance = TOLERANCES[dtype]
        self._most = most
        self._patience = patience
        self._slots: OrderedDict[Hashable, _Slot] = OrderedDict()
        self._refused: set[Hashable] = set()

    def __len__(self) -> int:
        """Number of recordings."""
        return sum(slot.recording is not None for slot in self._slots.values())

    def run(
        self, key: Hashable, function: Function, inputs: tuple[Tensor, ...], *, rows: int
    ) -> tuple[Tensor, ...] | None:
        """Call a function by replaying it.

        Args:
            key: all that its work depends on but the values of its inputs.
            function: what to call; not kept.
            inputs: tensors of n rows each, on the device.
            rows: the number it is recorded for, at least n.

        Returns:
            Its outputs, good until the next call; None where it must be called plainly.
        """
        if key in self._refused:
            return None
        slot = self._slots.setdefault(key, _Slot())
        self._slots.move_to_end(key)
        if len(self._slots) > self._most:
            self._slots.popitem(last=False)
        if slot.recording is not None:
            return self._replay(key, slot.recording, inputs)
        if slot.met < self._patience:
            slot.met += 1
            return None
        return self._record(key, function, inputs, rows=rows)

    def _replay(
        self, key: Hashable, recording: _Recording, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        try:
            return recording.run(inputs)
        except Exception:
            # Where the device itself has failed, the plain call fails as well and says so.
            logger.exception("a CUDA graph could not be replayed; its passes run without: %s", key)
        self._refuse(key)
        return None

    def _record(
        self, key: Hashable, function: Function, inputs: tuple[Tensor, ...], *, rows: int
    ) -> tuple[Tensor, ...] | None:
        """Record with empty inputs, so that a replay that does not read its inputs is noticed."""
        buffers = tuple(tensor.new_zeros(rows, *tensor.shape[1:]) for tensor in inputs)
        work = partial(function, *buffers)
        try:
            recording = _Recording(buffers, self._record_work(work))
            found = recording.run(inputs)
            same = all(map(self._agree, found, work()))
        except Exception:
            logger.exception("a CUDA graph could not be recorded; its passes run without: %s", key)
        else:
            if same:
                self._slots[key].recording = recording
                return found
            logger.error("a CUDA graph gave other values; its passes run without: %s", key)
        self._refuse(key)
        return None

    def _refuse(self, key: Hashable) -> None:
        self._refused.add(key)
        del self._slots[key]

    def _agree(self, found: Tensor, expected: Tensor) -> bool:
        """Whether scores and maps are the same; close scores may change the order of classes."""
        if not expected.is_floating_point():
            return True
        expected = expected[: len(found)].float()
        largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().amax())
        return torch.allclose(
            found.float(), expected, rtol=0.0, atol=self._tolerance * largest, equal_nan=True
        )
