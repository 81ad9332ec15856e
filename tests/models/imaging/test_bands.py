"""Networks of other than three 8-bit channels get what the file holds."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from models.compat import define_missing_operators
from models.errors import UnsupportedMediaType
from models.imaging.decode import DecodeLimits, decode
from models.imaging.preprocess import picture, preprocess
from models.types import Preprocess

define_missing_operators()
from torchvision.transforms import v2  # noqa: E402 # its operators may have to be defined first

LIMITS = DecodeLimits()
RNG = np.random.default_rng(0)


def tiff(samples: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    if samples.ndim == 3:
        options.setdefault("planarconfig", "contig")
    tifffile.imwrite(buffer, samples, **options)
    return buffer.getvalue()


def png(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(samples).save(buffer, "PNG")
    return buffer.getvalue()


def model_input(data: bytes, **fields):
    channels = fields.get("channels", 3)
    plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    spec = Preprocess(**{"resize": (16, 16), "crop": (16, 16), **plain, **fields})
    decoded = decode(data, limits=LIMITS, preprocess=spec)
    return preprocess(decoded, spec)[0], picture(decoded, spec), decoded


def test_grey_is_as_pillow_makes_it():
    colours = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    made, shown, _ = model_input(png(colours), resize=20, channels=1, mean=(0.5,), std=(0.5,))
    resize = v2.Compose([v2.Resize(20), v2.CenterCrop(16)])
    expected = np.asarray(resize(Image.fromarray(colours).convert("L")))
    np.testing.assert_array_equal(made[..., 0], expected)
    assert shown.shape == (16, 16, 3)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bands", [4, 7])
def test_all_bands_reach_the_network(bands, planar):
    samples = RNG.integers(0, 65536, (16, 16, bands), dtype=np.uint16)
    stored = samples if planar == "contig" else samples.transpose(2, 0, 1)
    data = tiff(stored, photometric="minisblack", planarconfig=planar)
    made, shown, decoded = model_input(data, channels=bands, bits=16)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made * 65535, samples.transpose(2, 0, 1), rtol=1e-6)
    assert (shown.shape, shown.dtype) == ((16, 16, 3), np.uint8)
    assert decoded.warnings[0].startswith("Maps are drawn on an 8-bit RGB form of the image")


def test_deep_samples_keep_all_their_bits():
    samples = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for data in (tiff(samples), png(samples)):
        made, _, _ = model_input(data, channels=1, bits=16, mean=(0.5,), std=(0.25,))
        np.testing.assert_allclose((made[0] * 0.25 + 0.5) * 65535, samples, atol=0.01)


def test_bands_are_resized_as_pillow_resizes_floats():
    samples = RNG.random((40, 30, 5), dtype=np.float32)
    data = tiff(samples, photometric="minisblack")
    made, _, _ = model_input(data, channels=5, bits=16)
    band = Image.fromarray(np.ascontiguousarray(samples[..., 4]))
    expected = np.asarray(band.resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(made[4], expected, atol=1e-6)


def test_orientation_turns_the_bands_too():
    samples = RNG.integers(0, 65536, (16, 16, 4), dtype=np.uint16)
    turned = (274, "H", 1, 6, True)
    data = tiff(samples, photometric="minisblack", extratags=[turned])
    made, _, _ = model_input(data, channels=4, bits=16)
    np.testing.assert_allclose(made * 65535, np.rot90(samples, -1).transpose(2, 0, 1), rtol=1e-6)


def test_missing_bands_are_refused_and_surplus_ones_said():
    four = tiff(RNG.integers(0, 256, (16, 16, 4), dtype=np.uint8), photometric="minisblack")
    with pytest.raises(UnsupportedMediaType, match=r"images of 5 bands, but this one has 4"):
        model_input(four, channels=5)
    _, _, decoded = model_input(four, channels=2)
    assert "The image has 4 bands: the model was given the first 2." in decoded.warnings


@pytest.mark.parametrize(("order", "fill"), [("rgb", (255, 51, 0)), ("bgr", (0, 51, 255))])
def test_a_letterbox_is_padded_with_the_mean_colour(order, fill):
    grey = png(np.full((8, 16, 3), 100, np.uint8))
    spec = {"fit": "contain", "mean": (1.0, 0.2, 0.0), "order": order}
    made, _, _ = model_input(grey, **spec)
    assert made[0, 0].tolist() == list(fill)
    assert made[8, 8].tolist() == [100, 100, 100]
    assert model_input(grey, padding=114, **spec)[0][0, 0].tolist() == [114] * 3


def test_images_that_are_not_resized_are_cropped_or_padded():
    small, large = (np.full((side, side, 3), 200, np.uint8) for side in (8, 30))
    padded, _, _ = model_input(png(small), fit="none")
    assert padded[0, 0].tolist() == [0, 0, 0]
    assert (padded == 200).sum() == 8 * 8 * 3
    large[7:23, 7:23] = 50
    cropped, _, _ = model_input(png(large), fit="none")
    assert (cropped == 50).all()
