"""Feature maps side by side in one image."""

from __future__ import annotations

import math

import numpy as np

from models.imaging import png
from models.imaging.colormaps import COLORMAPS, Colormap
from models.imaging.render import normalise

_GAP = 2
_MIN_TILE = 64
_MAX_SIDE = 2048

# Index 0 is kept for the gaps; maps use the rest of the palette.
_GAP_INDEX = 0


def grid_png(maps: np.ndarray, *, colormap: Colormap) -> bytes:
    """Draw feature maps as tiles of an 8-bit palette PNG, row by row from the top left.

    It is transparent between the tiles. Each map is scaled by itself from its least to its greatest
    value (a constant one is drawn as its least), and small maps are enlarged by a whole factor
    without smoothing: a tile shows the layer's own pixels.

    Args:
        maps: float32 (channels, h, w).
        colormap: name of the colour table.
    """
    channels, height, width = maps.shape
    columns = math.ceil(math.sqrt(channels))
    rows = math.ceil(channels / columns)
    factor = _factor(max(height, width), max(rows, columns))
    tile_height, tile_width = height * factor + _GAP, width * factor + _GAP
    image = np.full((rows * tile_height - _GAP, columns * tile_width - _GAP), _GAP_INDEX, np.uint8)
    for i, values in enumerate(maps):
        top, left = i // columns * tile_height, i % columns * tile_width
        tile = _tile(values).repeat(factor, axis=0).repeat(factor, axis=1)
        image[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    opacity = np.full(256, 255, np.uint8)
    opacity[_GAP_INDEX] = 0
    return png.encode_palette(image, palette=COLORMAPS[colormap], opacity=opacity)


def _factor(side: int, tiles: int) -> int:
    """How much tiles are enlarged: to `_MIN_TILE` pixels, as far as `_MAX_SIDE` allows."""
    return max(1, min(math.ceil(_MIN_TILE / side), _MAX_SIDE // (side * tiles)))


def _tile(values: np.ndarray) -> np.ndarray:
    unit = normalise(values, signed=False)
    if unit is None:
        return np.ones(values.shape, np.uint8)
    return (1 + np.rint(unit * np.float32(254))).astype(np.uint8)
