"""Maps of a long method together with what the method says about each of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NotedMaps:
    """What a long method may return instead of bare maps.

    Attributes:
        maps: float32 (T, h, w).
        notes: one sentence for each of the T maps; it goes into the explanation's warnings.
    """

    maps: Tensor
    notes: tuple[str, ...]
