from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from models.imaging import png
from models.imaging.colormaps import COLORMAPS
from models.imaging.grid import grid_png


def drawn(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices and RGBA of the picture of some maps."""
    image = Image.open(io.BytesIO(grid_png(maps, colormap="viridis")))
    return np.asarray(image), np.asarray(image.convert("RGBA"))


def test_each_map_is_scaled_by_itself() -> None:
    maps = np.stack(
        [np.array([[i, i + 1], [i + 2, i + 4]], np.float32) * 10.0**i for i in range(5)]
    )
    indices, _ = drawn(maps)
    # Three columns, two rows; 2 x 2 values, each drawn 32 x 32, and gaps of 2.
    assert indices.shape == (64 * 2 + 2, 64 * 3 + 4)
    for i in range(5):
        top, left = i // 3 * 66, i % 3 * 66
        tile = indices[top : top + 64, left : left + 64]
        assert np.array_equal(tile, tile[::32, ::32].repeat(32, axis=0).repeat(32, axis=1))
        assert np.abs(tile[::32, ::32] - (1 + 254 * np.array([[0, 0.25], [0.5, 1]]))).max() <= 0.5


def test_gaps_and_missing_tiles_are_transparent() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    indices, rgba = drawn(maps)
    assert indices.shape == (130, 130)
    clear = rgba[..., 3] == 0
    expected = np.zeros_like(clear)
    expected[64:66] = expected[:, 64:66] = True
    expected[66:, 66:] = True
    assert np.array_equal(clear, expected)
    assert np.array_equal(rgba[~clear, :3], COLORMAPS["viridis"][indices[~clear]])


def test_constant_and_broken_maps_are_drawn_flat() -> None:
    maps = np.stack([np.full((4, 4), value, np.float32) for value in (0, 3, np.nan)])
    indices, _ = drawn(maps)
    assert set(np.unique(indices)) == {0, 1}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 7, 7), (70, 70)),
        ((16, 112, 112), (454, 454)),
        ((1024, 14, 14), (31 * 2 + 32 * 56, 31 * 2 + 32 * 56)),
        ((4, 1, 5), (13 * 2 + 2, 65 * 2 + 2)),
    ],
)
def test_small_maps_are_enlarged_within_reason(
    shape: tuple[int, int, int], size: tuple[int, int]
) -> None:
    written = grid_png(np.zeros(shape, np.float32), colormap="gray")
    assert png.size(written) == (size[1], size[0])
