"""Where a map is strongest, in pixels of the original image."""

from __future__ import annotations

import math
from bisect import bisect_right

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
    strong = evidence >= BOX_THRESHOLD * evidence[row, column]
    connected = _grow(_blocks(strong), row // _BLOCK, column // _BLOCK)
    top, bottom = _span(strong, connected)
    left, right = _span(strong.T, connected.T)
    down, across = rows.start, columns.start
    corners = (across + left, down + top, across + right, down + bottom)
    return Location(x=x, y=y, box=_box(geometry, corners))


def _inside(geometry: Geometry) -> tuple[slice, slice]:
    """Rows and columns of the input whose pixels' centres lie in the image."""
    left, top = to_input(geometry, 0, 0)
    right, bottom = to_input(geometry, geometry.width, geometry.height)
    return (
        slice(max(0, math.ceil(top - 0.5)), min(geometry.input_height, math.ceil(bottom - 0.5))),
        slice(max(0, math.ceil(left - 0.5)), min(geometry.input_width, math.ceil(right - 0.5))),
    )


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

    Grows along whole runs of the mask, each of which is looked at once.
    """
    height, width = mask.shape
    # A False value after each row keeps its runs from those of the next.
    stride = width + 1
    flat = np.zeros(height * stride + 1, bool)
    flat[1:].reshape(height, stride)[:, :width] = mask
    ends = np.flatnonzero(flat[1:] != flat[:-1]).tolist()
    starts, stops = ends[::2], ends[1::2]
    first = bisect_right(starts, row * stride + column) - 1
    found, waiting = {first}, [first]
    while waiting:
        run = waiting.pop()
        for shift in (-stride, stride):
            start, stop = starts[run] + shift, stops[run] + shift
            other = bisect_right(stops, start)
            while other < len(starts) and starts[other] < stop:
                if other not in found:
                    found.add(other)
                    waiting.append(other)
                other += 1
    island = np.zeros(height * stride, bool)
    for run in found:
        island[starts[run] : stops[run]] = True
    return island.reshape(height, stride)[:, :width]


def _span(mask: np.ndarray, blocks: np.ndarray) -> tuple[int, int]:
    """First and last row, exclusive, of a mask's True values within some of its blocks."""
    rows = np.flatnonzero(blocks.any(1))
    first, last = (
        row * _BLOCK
        + np.flatnonzero(
            (
                mask[row * _BLOCK : (row + 1) * _BLOCK]
                & blocks[row].repeat(_BLOCK)[: mask.shape[1]]
            ).any(1)
        )
        for row in rows[[0, -1]].tolist()
    )
    return int(first[0]), int(last[-1]) + 1


def _box(geometry: Geometry, corners: tuple[int, int, int, int]) -> Box:
    """The box in the original of one (left, top, right, bottom) in the input."""
    left, top, right, bottom = corners
    x0, y0 = to_original(geometry, left, top)
    x1, y1 = to_original(geometry, right, bottom)
    x, y = max(0, math.floor(x0)), max(0, math.floor(y0))
    return Box(
        x=x,
        y=y,
        width=min(geometry.width, math.ceil(x1)) - x,
        height=min(geometry.height, math.ceil(y1)) - y,
    )
