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
    strong = _blocks(evidence >= BOX_THRESHOLD * evidence[row, column])
    occupied = np.bitwise_or.reduce(strong, axis=1).astype(bool)
    connected = _grow(occupied, row // _BLOCK, column // _BLOCK)
    island = strong * connected[:, None]
    top, bottom = _ends(np.bitwise_or.reduce(island, axis=2).ravel())
    left, right = _ends(np.bitwise_or.reduce(island, axis=(0, 1)).view(np.uint8))
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
    """A mask in blocks, uint32 (rows of blocks, 4, columns of blocks).

    A row of a block is four bytes, one number: much quicker to combine than four values.
    """
    height, width = mask.shape
    padded = np.zeros((height + -height % _BLOCK, width + -width % _BLOCK), bool)
    padded[:height, :width] = mask
    return padded.view(np.uint32).reshape(-1, _BLOCK, padded.shape[1] // _BLOCK)


def _grow(mask: np.ndarray, row: int, column: int) -> np.ndarray:
    """Connected component (by sides) of a True element.

    Each row is a number whose bits are its elements. Grows along whole runs of them, each of which
    is looked at once.
    """
    packed = np.packbits(mask, axis=1, bitorder="little")
    texts = packed.view(f"S{packed.shape[1]}").ravel().tolist()
    rows = [int.from_bytes(text, "little") for text in texts]
    # What is not found yet; the empty row at the end lies below the last one and above the first.
    rest = [*rows, 0]
    waiting = [(row, 1 << column)]
    while waiting:
        row, seeds = waiting.pop()
        bits = rest[row]
        while seeds := seeds & bits:
            below = (seeds & -seeds) - 1
            start = 1 << (below & ~bits).bit_length()
            # The sum carries through the run that begins at `start`, and clears it.
            run = bits & ~(bits + start)
            bits ^= run
            waiting += (row - 1, run), (row + 1, run)
        rest[row] = bits
    size = packed.shape[1]
    found = [
        (bits ^ others).to_bytes(size, "little")
        for bits, others in zip(rows, rest[:-1], strict=True)
    ]
    island = np.frombuffer(b"".join(found), np.uint8).reshape(packed.shape)
    return np.unpackbits(island, axis=1, count=mask.shape[1], bitorder="little").view(bool)


def _ends(values: np.ndarray) -> tuple[int, int]:
    """Index of the first value that is not zero, and of the one after the last."""
    places = np.flatnonzero(values)
    return int(places[0]), int(places[-1]) + 1


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
