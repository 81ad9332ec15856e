"""The colour tables that maps are drawn with: 256 RGB levels each, lowest value first."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import cmap
import numpy as np

Colormap = Literal["turbo", "viridis", "inferno", "magma", "jet", "gray", "coolwarm"]

# With their namespaces: a bare `coolwarm` names two tables.
_CMAP_NAMES: Mapping[Colormap, str] = {
    "turbo": "google:turbo",
    "viridis": "bids:viridis",
    "inferno": "bids:inferno",
    "magma": "bids:magma",
    "jet": "matlab:jet",
    "gray": "matlab:gray",
    "coolwarm": "matplotlib:coolwarm",
}


def _table(cmap_name: str) -> np.ndarray:
    levels = cmap.Colormap(cmap_name).lut(256)[:, :3]
    table: np.ndarray = np.rint(levels * 255).astype(np.uint8)
    table.setflags(write=False)
    return table


COLORMAPS: Mapping[Colormap, np.ndarray] = MappingProxyType(
    {name: _table(cmap_name) for name, cmap_name in _CMAP_NAMES.items()}
)
"""Colour tables by name, in the order of the wire contract: read-only uint8 (256, 3)."""
