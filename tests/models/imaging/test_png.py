from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from models.imaging import png

SIDES = st.integers(1, 40)


@given(st.data(), SIDES, SIDES)
def test_palette_pictures_are_read_back_exactly(
    data: st.DataObject, height: int, width: int
) -> None:
    indices = data.draw(arrays(np.uint8, (height, width)))
    palette = data.draw(arrays(np.uint8, (256, 3)))
    opacity = data.draw(arrays(np.uint8, 256))
    written = png.encode_palette(indices, palette=palette, opacity=opacity)
    with Image.open(io.BytesIO(written), formats=("PNG",)) as image:
        assert image.mode == "P"
        assert image.size == (width, height) == png.size(written)
        assert np.array_equal(np.asarray(image), indices)
        assert np.array_equal(np.reshape(image.getpalette(), (256, 3)), palette)
        assert image.info["transparency"] == opacity.tobytes()
        rgba = np.asarray(image.convert("RGBA"))
    assert np.array_equal(rgba, np.dstack([palette[indices], opacity[indices]]))


@given(st.data(), SIDES, SIDES)
def test_rgb_pictures_are_read_back_exactly(data: st.DataObject, height: int, width: int) -> None:
    pixels = data.draw(arrays(np.uint8, (height, width, 3)))
    written = png.encode_rgb(pixels)
    with Image.open(io.BytesIO(written), formats=("PNG",)) as image:
        image.verify()
    with Image.open(io.BytesIO(written), formats=("PNG",)) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)


def test_views_are_written_as_they_look() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    view = pixels[::2, ::-3]
    with Image.open(io.BytesIO(png.encode_rgb(view))) as image:
        assert np.array_equal(np.asarray(image), view)


@pytest.mark.parametrize("smooth", [True, False])
def test_pictures_are_compressed(smooth: bool) -> None:
    ramp = np.tile(np.arange(224, dtype=np.uint8), (224, 1))
    if smooth:
        grey = np.zeros((256, 3), np.uint8)
        size = len(png.encode_palette(ramp, palette=grey, opacity=np.zeros(256, np.uint8)))
    else:
        size = len(png.encode_rgb(np.dstack([ramp] * 3)))
    assert size < 4000
