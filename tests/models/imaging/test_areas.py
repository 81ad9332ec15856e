"""Areas of an image, as pixels of the model's input."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from models.areas import Area, area_of
from models.errors import InvalidOption
from models.image_types import Geometry, Region
from models.imaging.areas import draw_areas

# The middle of a picture of 40 x 20, enlarged twice.
GEOMETRY = Geometry(
    width=40,
    height=20,
    region=Region(x=10, y=0, width=20, height=20),
    input_width=40,
    input_height=40,
)


def png(pixels: np.ndarray, image_format: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return base64.b64encode(buffer.getvalue()).decode()


def drawn(raw: dict) -> np.ndarray:
    area = area_of({"class": 0, **raw})
    assert area is not None
    return draw_areas([area], GEOMETRY)[0]


def test_a_box_is_the_pixels_whose_centres_lie_in_it():
    found = drawn({"box": {"x": 12, "y": 5, "width": 4, "height": 2}})
    expected = np.zeros((40, 40), np.uint8)
    expected[10:14, 4:12] = 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("side", [None, 1e-3])
def test_a_point_and_a_tiny_box_are_one_pixel(side):
    where = {"x": 15.2, "y": 3.1}
    raw = {"point": where} if side is None else {"box": where | {"width": side, "height": side}}
    found = drawn(raw)
    assert found.sum() == 1
    assert found[6, 10] == 1


@pytest.mark.parametrize("scale", [1, 3])
def test_a_mask_of_any_size_is_stretched_over_the_image(scale):
    mask = np.zeros((20 * scale, 40 * scale), np.uint8)
    mask[5 * scale : 7 * scale, 12 * scale : 16 * scale] = 255
    box = {"x": 12, "y": 5, "width": 4, "height": 2}
    np.testing.assert_array_equal(drawn({"mask": png(mask)}), drawn({"box": box}))


def test_padding_around_an_image_is_in_no_mask():
    padded = Geometry(
        width=20,
        height=10,
        region=Region(x=0, y=-5, width=20, height=20),
        input_width=20,
        input_height=20,
    )
    (found,) = draw_areas([Area(mask=png(np.full((4, 4), 255, np.uint8)))], padded)
    assert found[5:15].all()
    assert found.sum() == 10 * 20


@pytest.mark.parametrize(
    "mask",
    [
        "",
        "???",
        "aGVsbG8=",
        png(np.zeros((4, 4), np.uint8), "BMP"),
        png(np.zeros((1001, 1000), bool)),
    ],
)
def test_what_is_no_small_png_is_no_mask(mask):
    with pytest.raises(InvalidOption, match="base64 of a PNG"):
        draw_areas([Area(mask=mask)], GEOMETRY)


@pytest.mark.parametrize(
    "raw",
    [
        {"box": {"x": 0, "y": 0, "width": 9, "height": 20}},
        {"point": {"x": 35, "y": 5}},
        {"mask": png(np.zeros((4, 4), np.uint8))},
    ],
)
def test_an_area_that_the_model_does_not_see_is_refused(raw):
    with pytest.raises(InvalidOption, match="no pixel in the part"):
        drawn(raw)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"box": {"x": 0, "y": 0, "width": 1}}, "targets.box"),
        ({"box": {"x": 0, "y": 0, "width": 1, "height": 0}}, "targets.box"),
        ({"box": {"x": "0", "y": 0, "width": 1, "height": 1}}, "targets.box"),
        ({"point": {"x": float("nan"), "y": 0}}, "targets.point"),
        ({"point": [1, 2]}, "targets.point"),
        ({"mask": 3}, "targets.mask"),
        ({"point": {"x": 1, "y": 1}, "mask": ""}, "targets"),
    ],
)
def test_malformed_areas_name_their_field(raw, field):
    with pytest.raises(InvalidOption) as caught:
        area_of({"class": 0, **raw})
    assert caught.value.field == field
