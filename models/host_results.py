"""A batch's results, brought from the device to the host in one transfer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.cuda.staging import indices, warn_unlocked
from models.methods import METHODS, implementation, weights_implementation
from models.shared_pass import SharedPass
from models.targets import depth, resolve_ranks
from models.types import Job

K = TypeVar("K", bound=Hashable)
_Key = tuple[Any, ...]


class HostResults:
    """The numbers of a batch, on the host; only statistics come in a transfer of their own.

    Attributes:
        logits: float32 (N, classes).
        probabilities: float32 (N, classes).
        order: int64 (N, k), classes of each image, best first, as far as any job looks.
        targets: of each image, ranks looked up.
    """

    def __init__(self, jobs: Sequence[Job], shared: SharedPass) -> None:
        """Compute the maps of the one-pass methods for the whole batch, and fetch everything."""
        tensors: dict[_Key, Tensor] = {
            ("logits",): shared.logits,
            ("probabilities",): shared.probabilities,
            ("order",): shared.order[:, : depth(jobs)],
        }
        self._rows: dict[_Key, list[int]] = {}
        for layer in shared.captures:
            for key, tensor, rows in _explain(jobs, layer, shared):
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
        """Channel weights (K,) for an image's first target, where its job wants statistics."""
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


def fetch(tensors: Mapping[K, Tensor]) -> dict[K, np.ndarray]:
    """Bring tensors to the host, all in one transfer: waiting leaves the device without work.

    Arrays have the shape and dtype of their tensors, and are views of those already on the host.
    """
    arrays = {key: t.detach().numpy() for key, t in tensors.items() if _on_host(t)}
    # The widest first, so that every array begins at a multiple of its item's size.
    away = sorted(tensors.keys() - arrays.keys(), key=lambda key: -tensors[key].element_size())
    if not away:
        return arrays
    packed = torch.cat([tensors[key].detach().reshape(-1).view(torch.uint8) for key in away])
    data, start = _to_host(packed), 0
    for key in away:
        tensor = tensors[key]
        end = start + tensor.numel() * tensor.element_size()
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        arrays[key] = data[start:end].view(dtype).reshape(tensor.shape)
        start = end
    return arrays


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _to_host(packed: Tensor) -> np.ndarray:
    """Copy bytes of a CUDA device by way of page-locked memory, which torch keeps for reuse."""
    try:
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    except RuntimeError:
        warn_unlocked()
        return packed.cpu().numpy()
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).record_event().synchronize()
    # A copy: a result that is kept must not keep page-locked memory.
    return host.numpy().copy()


def _explain(
    jobs: Sequence[Job], layer: str, shared: SharedPass
) -> Iterator[tuple[_Key, Tensor, list[int]]]:
    """Key, values and batch rows of all one-pass maps and weights asked for at a layer."""
    capture, rows = shared.captures[layer]
    names = dict.fromkeys(name for row in rows for name in jobs[row].options.methods)
    if any(METHODS[name].assumes_nonnegative for name in names):
        yield ("negative", layer), (capture.activation < 0).flatten(1).any(1), rows
    for name in names:
        if METHODS[name].cost not in ("pass", "head"):
            continue
        if name in shared.maps:
            yield ("map", layer, name), shared.maps[name], rows
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
