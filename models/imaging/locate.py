"""Where a map is strongest, in pixels of the original image."""

from __future__ import annotations

import math

import numpy as np

from models.imaging.preprocess import to_input, to_original
from models.imaging.render import is_degenerate, normalise, upsample
from models.types import Geometry, Struct

BOX_THRESHOLD = 0.5
"""Share of the greatest value that a pixel inside the box reaches."""

# Side, in pixels of the model input, of the blocks that are looked at as one when the pixels around
# a peak are sought.
_BLOCK = 4


class Box(Struct):
    """A rectangle in whole pixels of the original image."""

    x: int
    y: int
    width: int
    height: int


class Location(Struct):
    """Where a map is strongest.

    Attributes:
        x, y: centre of the greatest value's pixel at the model's input size.
        box: bounding box of the connected pixels around it that reach half the greatest value.
    """

    x: float
    y: float
    box: Box


def locate(
    values: np.ndarray, geometry: Geometry, *, signed: bool, unit: np.ndarray | None = None
) -> Location | None:
    """Find the peak of a raw map (h, w) and the box around it, within the image.

    The map is enlarged to the model's input size and normalised. Of a signed map only what speaks
    for the class counts, and what lies on the padding of the crop counts nowhere.

    Args:
        values: the map.
        geometry: where it lies in the original image.
        signed: whether negative values mean something else than little.
        unit: the map as enlarged and normalised, if that has been done.

    Returns:
        None if the map is degenerate, or nothing in it speaks for the class.
    """
    if unit is None:
        if is_degenerate(values):
            return None
        full = upsample(values, height=geometry.input_height, width=geometry.input_width)
        unit = normalise(full, signed=signed)
    if unit is None:
        return None
    rows, columns = _inside(geometry)
    evidence = unit[rows, columns] * 2 - 1 if signed else unit[rows, columns]
    row, column = divmod(int(evidence.argmax()), evidence.shape[1])
    if evidence[row, column] <= 0:
        return None
    x, y = to_original(geometry, columns.start + column + 0.5, rows.start + row + 0.5)
    island = _island(evidence >= BOX_THRESHOLD * evidence[row, column], row, column)
    return Location(x=x, y=y, box=_box(island, geometry, rows.start, columns.start))


def _inside(geometry: Geometry) -> tuple[slice, slice]:
    """Rows and columns of the input whose pixels' centres lie in the image."""
    left, top = to_input(geometry, 0, 0)
    right, bottom = to_input(geometry, geometry.width, geometry.height)
    return (
        slice(max(0, math.ceil(top - 0.5)), min(geometry.input_height, math.ceil(bottom - 0.5))),
        slice(max(0, math.ceil(left - 0.5)), min(geometry.input_width, math.ceil(right - 0.5))),
    )


def _island(mask: np.ndarray, row: int, column: int) -> np.ndarray:
    """The pixels of a mask that are connected with the one at (row, column).

    They are connected by blocks that share a side. Blocks make this cheap for smooth maps and noisy
    ones alike; a gap narrower than a block may be stepped over.
    """
    height, width = mask.shape
    blocks = _blocks(mask)
    connected = _grow(blocks, row // _BLOCK, column // _BLOCK)
    whole = connected.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)
    island: np.ndarray = whole[:height, :width] & mask
    return island


def _blocks(mask: np.ndarray) -> np.ndarray:
    """Which blocks of a mask hold a True value."""
    height, width = mask.shape
    padded = np.zeros((height + -height % _BLOCK, width + -width % _BLOCK), bool)
    padded[:height, :width] = mask
    # A row of a block is four bytes, one number: much quicker to combine than four values.
    numbers = padded.view(np.uint32)
    blocks: np.ndarray = (
        np.bitwise_or.reduce(numbers.reshape(-1, _BLOCK, numbers.shape[1]), axis=1) != 0
    )
    return blocks


def _grow(mask: np.ndarray, row: int, column: int) -> np.ndarray:
    """Connected component (by sides) of a True element.

    Grows along whole runs of the mask, rows and columns in turn, so that a blob takes a few rounds.
    """
    across, down = _runs(mask), _runs(mask.T).T
    island = np.zeros_like(mask)
    island[row, column] = True
    count, most = 0, int(np.count_nonzero(mask))
    while count < most and (grown := int(np.count_nonzero(island))) > count:
        count = grown
        for runs in (across, down):
            reached = np.zeros(runs.max() + 1, bool)
            reached[runs[island]] = True
            island = reached[runs] & mask
    return island


def _runs(mask: np.ndarray) -> np.ndarray:
    """Number each run of True values within a row; False values carry any run's number."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    return np.cumsum(starts, dtype=np.int32).reshape(mask.shape)


def _box(island: np.ndarray, geometry: Geometry, top: int, left: int) -> Box:
    """Bounding box in the original of pixels of the input, whose own corner is (top, left)."""
    rows, columns = np.flatnonzero(island.any(1)), np.flatnonzero(island.any(0))
    x0, y0 = to_original(geometry, left + int(columns[0]), top + int(rows[0]))
    x1, y1 = to_original(geometry, left + int(columns[-1]) + 1, top + int(rows[-1]) + 1)
    x, y = max(0, math.floor(x0)), max(0, math.floor(y0))
    return Box(
        x=x,
        y=y,
        width=min(geometry.width, math.ceil(x1)) - x,
        height=min(geometry.height, math.ceil(y1)) - y,
    )
