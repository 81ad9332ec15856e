"""What the answers of a batch read, brought to the host in one transfer (statistics come in one of their own)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from models.methods import METHODS, implementation, weights_implementation
from models.targets import resolve_ranks
from models.cuda.staging import indices
from models.host_results import fetch
from models.shared_pass import SharedPass
from models.types import Job

_Key = tuple[Any, ...]


class HostResults:
    """The numbers of a batch, on the host.

    Attributes:
        logits: float32 (N, classes).
        probabilities: float32 (N, classes).
        order: int64 (N, k), classes of each image, best first, as far as any job looks.
        targets: of each image, ranks looked up.
    """

    def __init__(self, jobs: Sequence[Job], trunk: SharedPass) -> None:
        """Compute the maps of the one-pass methods, for all images that ask at once, and fetch everything.

        Args:
            jobs: the batch.
            trunk: what its pass gave.
        """
        tensors: dict[_Key, Tensor] = {
            ("logits",): trunk.logits,
            ("probabilities",): trunk.probabilities,
            ("order",): trunk.order[:, : _depth(jobs)],
        }
        self._rows: dict[_Key, list[int]] = {}
        for layer in trunk.captures:
            for key, tensor, rows in _explain(jobs, layer, trunk):
                tensors[key], self._rows[key] = tensor, rows
        self._values = fetch(tensors)
        self.logits = self._values["logits",]
        self.probabilities = self._values["probabilities",]
        self.order = self._values["order",]
        ranked = zip(jobs, self.order.tolist(), strict=True)
        self.targets = [resolve_ranks(job.options.targets, classes) for job, classes in ranked]

    def map(self, layer: str, method: str, row: int) -> np.ndarray | None:
        """Maps (T, h, w) of an image by a method that needs nothing but the shared pass."""
        return self._value(("map", layer, method), row)

    def weights(self, layer: str, method: str, row: int) -> np.ndarray | None:
        """Weights (K,) of the channels for an image's first target, where its job wants statistics."""
        return self._value(("weights", layer, method), row)

    def has_negative(self, layer: str, row: int) -> bool:
        """Whether an activation has negative values, where a method assumes that it has none."""
        return bool(self._value(("negative", layer), row))

    def _value(self, key: _Key, row: int) -> np.ndarray | None:
        rows = self._rows.get(key, [])
        if row not in rows:
            return None
        value: np.ndarray = self._values[key][rows.index(row)]
        return value


def _depth(jobs: Sequence[Job]) -> int:
    """How many of the best classes any job names or lists."""
    refs = [ref for job in jobs for t in job.options.targets for ref in (t.cls, *t.against)]
    ranks = [ref.value for ref in refs if ref.kind == "rank"]
    return max([*ranks, *(job.options.top_k for job in jobs)])


def _explain(
    jobs: Sequence[Job], layer: str, trunk: SharedPass
) -> Iterator[tuple[_Key, Tensor, list[int]]]:
    """Maps and weights of every one-pass method asked for at a layer: key, values, and the row of each."""
    capture, rows = trunk.captures[layer]
    names = dict.fromkeys(name for row in rows for name in jobs[row].options.methods)
    if any(METHODS[name].assumes_nonnegative for name in names):
        yield ("negative", layer), (capture.activation < 0).flatten(1).any(1), rows
    for name in names:
        if METHODS[name].cost not in ("pass", "head"):
            continue
        if name in trunk.maps:
            yield ("map", layer, name), trunk.maps[name], rows
            continue
        chosen = [i for i, row in enumerate(rows) if name in jobs[row].options.methods]
        part = capture
        if len(chosen) < len(rows):
            part = capture.rows(indices(chosen, capture.activation.device))
        asking = [rows[i] for i in chosen]
        yield ("map", layer, name), implementation(name)(part), asking
        weigh = weights_implementation(name)
        if weigh and any(jobs[row].options.statistics for row in asking):
            yield ("weights", layer, name), weigh(part)[:, 0], asking
