from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from models.imaging import resampling
from models.imaging.resampling import resize_part

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


@pytest.fixture
def _native() -> None:
    if resampling._function() is None:
        pytest.skip("resampling.c is not built")


def noise(width: int, height: int, *, hard: bool = False) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray((values >> 7) * np.uint8(255) if hard else values)


@pytest.mark.usefixtures("_native")
# Enlarged, at the ends, where cubic weights are negative; one row; reduced to one row.
@example(width=9, height=17, hard=True, short=90, edges=(0, 0, 1, 1), resample=BICUBIC)
@example(width=40, height=1, hard=True, short=3, edges=(0, 0, 1, 1), resample=BICUBIC)
@example(width=150, height=20, hard=False, short=1, edges=(0.5, 0, 0.6, 1), resample=BILINEAR)
@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    hard=st.booleans(),
    short=st.integers(1, 130),
    edges=st.tuples(*[st.floats(0, 1)] * 4),
    resample=st.sampled_from([BILINEAR, BICUBIC]),
)
def test_a_part_is_what_pillow_s_whole_image_has(
    width: int,
    height: int,
    hard: bool,
    short: int,
    edges: tuple[float, float, float, float],
    resample: Image.Resampling,
) -> None:
    height = min(height, 2 * width)
    image = noise(width, height, hard=hard)
    scale = short / min(width, height)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    (left, right), (top, bottom) = (
        (int(min(a, b) * (side - 1)), int(max(a, b) * (side - 1)) + 1)
        for a, b, side in ((edges[0], edges[2], size[0]), (edges[1], edges[3], size[1]))
    )
    part = (left, top, right, bottom)
    whole = image.resize(size, resample).crop(part)
    assert np.array_equal(resize_part(image, size, resample, part), np.asarray(whole))


@pytest.mark.parametrize(
    ("image", "resample"),
    [
        (noise(20, 20).convert("L"), BICUBIC),
        (noise(20, 20).convert("F"), BICUBIC),
        (noise(20, 20), Image.Resampling.NEAREST),
        (noise(20, 20), Image.Resampling.LANCZOS),
        (Image.new("RGB", (2200, 2200)), BICUBIC),
    ],
    ids=["grey", "float", "nearest", "lanczos", "large"],
)
def test_the_rest_is_left_to_pillow(image: Image.Image, resample: Image.Resampling) -> None:
    assert resize_part(image, (10, 10), resample, (0, 0, 10, 10)) is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_native_code_was_built() -> None:
    assert importlib.util.find_spec("models.imaging._resampling") is not None
