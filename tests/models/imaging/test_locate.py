from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from skimage import measure

from models.imaging.locate import Box, _grow, locate
from models.types import Geometry, Region

WHOLE = Geometry(
    width=448,
    height=336,
    region=Region(x=0, y=0, width=448, height=336),
    input_width=224,
    input_height=168,
)


def bump(x: float, y: float, *, spread: float = 8, geometry: Geometry = WHOLE) -> np.ndarray:
    """A bell at a point of the input, at the input's size."""
    across = np.arange(geometry.input_width) + 0.5 - x
    down = np.arange(geometry.input_height)[:, None] + 0.5 - y
    return np.exp(-(across**2 + down**2) / (2 * spread**2)).astype(np.float32)


def test_the_peak_of_a_bell() -> None:
    found = locate(bump(70.5, 41.5), WHOLE, signed=False)
    assert found is not None
    assert (found.x, found.y) == (141, 83)
    # Half the height is reached 1.177 spreads away, in pixels twice as small.
    assert found.box.x + found.box.width / 2 == pytest.approx(141, abs=1)
    assert found.box.width == pytest.approx(4 * 1.177 * 8, abs=3)
    assert found.box.height == found.box.width


def test_a_map_of_a_layer() -> None:
    values = np.zeros((7, 7), np.float32)
    values[2, 5] = 1
    found = locate(values, WHOLE, signed=False)
    assert found is not None
    assert found.x == pytest.approx(5.5 * 64, abs=2)
    assert found.y == pytest.approx(2.5 * 48, abs=2)
    assert found.box == Box(x=320, y=96, width=64, height=48)


def test_coordinates_are_the_original_picture_s() -> None:
    geometry = Geometry(
        width=500,
        height=375,
        region=Region(x=62.5, y=0, width=375, height=375),
        input_width=224,
        input_height=168,
    )
    found = locate(bump(56.5, 84.5), geometry, signed=False)
    assert found is not None
    assert found.x == pytest.approx(62.5 + 56.5 * 375 / 224)
    assert found.y == pytest.approx(84.5 * 375 / 168)


def test_the_box_is_around_the_peak_alone() -> None:
    found = locate(bump(50, 50) + 0.8 * bump(180, 120), WHOLE, signed=False)
    assert found is not None
    assert found.box.x + found.box.width < 200
    alone = locate(bump(50, 50), WHOLE, signed=False)
    assert alone is not None
    assert found.box == alone.box


def test_only_what_speaks_for_the_class_counts() -> None:
    values = 0.3 * bump(50, 50) - bump(180, 120)
    found = locate(values, WHOLE, signed=True)
    assert found is not None
    assert (found.x, found.y) == pytest.approx((100, 100), abs=2)
    assert locate(-bump(50, 50), WHOLE, signed=True) is None
    assert locate(-bump(50, 50), WHOLE, signed=False) is not None


@pytest.mark.parametrize("value", [0.0, 0.3, np.nan])
@pytest.mark.parametrize("signed", [False, True])
def test_degenerate_maps_have_no_place(value: float, signed: bool) -> None:
    assert locate(np.full((7, 7), value, np.float32), WHOLE, signed=signed) is None


def test_padding_counts_nowhere() -> None:
    geometry = Geometry(
        width=60,
        height=60,
        region=Region(x=-20, y=-20, width=100, height=100),
        input_width=100,
        input_height=100,
    )
    values = bump(3, 3, geometry=geometry) + 0.5 * bump(50, 40, geometry=geometry)
    found = locate(values, geometry, signed=False)
    assert found is not None
    assert (found.x, found.y) == pytest.approx((30, 20), abs=1)


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(-9, 9, width=32),
    ),
    st.booleans(),
    st.tuples(st.floats(-50, 50), st.floats(-50, 50)),
    st.floats(60, 200),
)
def test_whatever_is_found_lies_in_the_picture(
    values: np.ndarray, signed: bool, corner: tuple[float, float], side: float
) -> None:
    geometry = Geometry(
        width=100,
        height=80,
        region=Region(x=corner[0], y=corner[1], width=side, height=side),
        input_width=64,
        input_height=48,
    )
    found = locate(values, geometry, signed=signed)
    if found is not None:
        box = found.box
        assert 0 <= box.x <= found.x <= box.x + box.width <= 100
        assert 0 <= box.y <= found.y <= box.y + box.height <= 80
        assert min(box.width, box.height) >= 1


@given(
    arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=16), elements=st.booleans()),
    st.data(),
)
def test_growing_finds_a_connected_component(mask: np.ndarray, data: st.DataObject) -> None:
    places = np.argwhere(mask)
    if len(places):
        row, column = data.draw(st.sampled_from(places.tolist()))
        labels = measure.label(mask, connectivity=1)
        assert np.array_equal(_grow(mask, row, column), labels == labels[row, column])


def test_growing_follows_a_spiral() -> None:
    mask = np.zeros((41, 41), bool)
    low, high = 0, 40
    while low < high:
        mask[low, low : high + 1] = mask[low:high, high] = True
        mask[high, low : high + 1] = mask[low + 2 : high, low] = True
        mask[low + 2, low : low + 3] = True
        low, high = low + 2, high - 2
    labels = measure.label(mask, connectivity=1)
    assert np.array_equal(_grow(mask, 0, 0), labels == labels[0, 0])


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=24),
        elements=st.sampled_from([0, 0.4, 0.6, 1]),
    )
)
def test_the_box_bounds_strong_pixels_in_connected_blocks(values: np.ndarray) -> None:
    height, width = values.shape
    region = Region(x=0, y=0, width=width, height=height)
    geometry = Geometry(
        width=width, height=height, region=region, input_width=width, input_height=height
    )
    found = locate(values, geometry, signed=False)
    if found is not None:
        unit = (values - values.min()) / np.ptp(values)
        strong = unit >= 0.5
        blocks = measure.block_reduce(strong, 4, np.max)
        labels = measure.label(blocks, connectivity=1).repeat(4, 0).repeat(4, 1)[:height, :width]
        row, column = np.unravel_index(unit.argmax(), unit.shape)
        rows, columns = np.nonzero(strong & (labels == labels[row, column]))
        box = found.box
        assert (found.x, found.y) == (column + 0.5, row + 0.5)
        assert (box.x, box.x + box.width) == (columns.min(), columns.max() + 1)
        assert (box.y, box.y + box.height) == (rows.min(), rows.max() + 1)
