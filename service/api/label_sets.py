"""The label sets of earlier requests, which devices need not encode again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from models.types import ModelInfo

_KEPT = 16


class LabelSets:
    """Remembers which sets of labels a model has answered last; it decides only what is expected."""

    def __init__(self) -> None:
        self._sets: OrderedDict[tuple[str, str, tuple[str, ...]], None] = OrderedDict()

    def add(self, info: ModelInfo) -> None:
        """A request has been answered whose labels are those of `info`."""
        key = _key(info, info.labels)
        self._sets[key] = None
        self._sets.move_to_end(key)
        while len(self._sets) > _KEPT:
            self._sets.popitem(last=False)

    def has(self, info: ModelInfo, labels: Sequence[str]) -> bool:
        """Whether a model has answered a request with these labels."""
        return _key(info, labels) in self._sets


def _key(info: ModelInfo, labels: Sequence[str]) -> tuple[str, str, tuple[str, ...]]:
    return info.card.full_name, info.fingerprint, tuple(labels)
