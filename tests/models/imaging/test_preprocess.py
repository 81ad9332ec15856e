from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from skimage import data as pictures

from models import compat
from models.imaging import resampling
from models.imaging.decode import DecodedImage, DecodeLimits, decode
from models.imaging.preprocess import preprocess, to_input, to_original
from models.types import Geometry, Preprocess, Region

compat.define_missing_operators()

from timm.data import create_transform  # noqa: E402 - needs the line above
from torchvision.transforms import InterpolationMode, v2  # noqa: E402
from torchvision.transforms._presets import ImageClassification  # noqa: E402

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
SIZES = [
    (500, 375),
    (427, 640),
    (333, 333),
    (1023, 767),
    (300, 20),
    (41, 300),
    (257, 256),
    (40, 41),
]
ASTRONAUT = Image.fromarray(pictures.astronaut())
NOISE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (1100, 1100, 3), dtype=np.uint8))


@pytest.fixture(params=["native", "pillow"], scope="module", autouse=True)
def _ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for the native code and without it."""
    if request.param == "pillow":
        with mock.patch.object(resampling, "_function", return_value=None):
            yield
    elif resampling._function() is None:
        pytest.skip("resampling.c is not built")
    else:
        yield


def resized(width: int, height: int) -> Image.Image:
    return ASTRONAUT.resize((width, height), Image.Resampling.BICUBIC)


def picture(image: Image.Image) -> DecodedImage:
    return DecodedImage(
        image=image, width=image.width, height=image.height, box=(0, 0, *image.size), drafted=False
    )


def ours(image: Image.Image, spec: Preprocess) -> np.ndarray:
    values, _ = preprocess(picture(image), spec)
    assert values.dtype == np.uint8
    assert values.shape == (*spec.crop, 3)
    assert values.flags.writeable
    return values.astype(int)


def torchvisions(image: Image.Image, resize: int, crop: int, interpolation: str) -> np.ndarray:
    preset = ImageClassification(
        crop_size=crop,
        resize_size=resize,
        interpolation=InterpolationMode(interpolation),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    return np.rint(preset(image).numpy().transpose(1, 2, 0) * 255).astype(int)


def timms(image: Image.Image, size: tuple[int, int], **options: object) -> np.ndarray:
    transform = create_transform(input_size=(3, *size), normalize=False, **options)
    return transform(image).numpy().transpose(1, 2, 0).astype(int)


# ---------------------------------------------------------------- torchvision


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (40, 57)])
def test_torchvisions_presets(
    interpolation: str, size: tuple[int, int], resize: int, crop: int
) -> None:
    image = resized(*size)
    spec = Preprocess(resize=resize, crop=(crop, crop), interpolation=interpolation)
    expected = torchvisions(image, resize, crop, interpolation)
    assert np.array_equal(ours(image, spec), expected)


@given(
    st.integers(2, 600),
    st.integers(2, 600),
    st.integers(8, 120),
    st.integers(8, 120),
    st.sampled_from(INTERPOLATIONS),
)
def test_any_size_equals_torchvision(
    width: int, height: int, resize: int, crop: int, interpolation: str
) -> None:
    image = NOISE.crop((0, 0, width, height))
    mode = InterpolationMode(interpolation)
    library = v2.Compose([v2.Resize(resize, interpolation=mode), v2.CenterCrop(crop)])
    expected = np.asarray(library(image)).astype(int)
    spec = Preprocess(resize=resize, crop=(crop, crop), interpolation=interpolation)
    assert np.array_equal(ours(image, spec), expected)


# ---------------------------------------------------------------- timm


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize(("side", "crop_pct"), [(224, 0.875), (224, 0.95), (240, 0.9), (64, 1.0)])
def test_timms_centre_mode(
    interpolation: str, size: tuple[int, int], side: int, crop_pct: float
) -> None:
    image = resized(*size)
    spec = Preprocess(resize=int(side / crop_pct), crop=(side, side), interpolation=interpolation)
    expected = timms(image, (side, side), interpolation=interpolation, crop_pct=crop_pct)
    assert np.array_equal(ours(image, spec), expected)


@pytest.mark.parametrize(
    ("fit", "crop_mode", "target"),
    [
        ("stretch", "squash", (96, 160)),
        ("stretch", "squash", (128, 128)),
        ("cover", "center", (96, 160)),  # squares are torchvision's business
        ("cover", "center", (160, 96)),
        ("contain", "border", (96, 160)),
        ("contain", "border", (160, 96)),
        ("contain", "border", (128, 128)),
    ],
)
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (100, 90), (31, 300)], ids=str)
@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
def test_timms_other_modes(
    fit: str, crop_mode: str, target: tuple[int, int], size: tuple[int, int], crop_pct: float
) -> None:
    image = resized(*size)
    mean = (0.485, 0.456, 0.406)
    spec = Preprocess(
        resize=(int(target[0] / crop_pct), int(target[1] / crop_pct)),
        crop=target,
        fit=fit,
        interpolation="bicubic",
        mean=mean,
    )
    expected = timms(
        image,
        target,
        interpolation="bicubic",
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        mean=mean,
    )
    assert np.array_equal(ours(image, spec), expected)


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("size", [(2, 200_000), (200_000, 2)], ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_extreme_shapes_need_no_extreme_memory(size: tuple[int, int], interpolation: str) -> None:
    """The whole resized picture would have 6.5 gigapixels."""
    spec = Preprocess(resize=256, crop=(224, 224), interpolation=interpolation)
    values, geometry = preprocess(picture(Image.new("RGB", size, (9, 8, 7))), spec)
    assert (values == (9, 8, 7)).all()
    assert geometry.region.width == pytest.approx(1.75, rel=1e-4)


@pytest.mark.parametrize("interpolation", ["bilinear", "hamming", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(500, 375), (300, 20), (257, 256)], ids=str)
def test_resizing_the_crop_alone_is_close(
    monkeypatch: pytest.MonkeyPatch, interpolation: str, size: tuple[int, int]
) -> None:
    spec = Preprocess(resize=232, crop=(224, 224), interpolation=interpolation)
    image = NOISE.crop((0, 0, *size))
    whole = ours(image, spec)
    monkeypatch.setattr(sys.modules[preprocess.__module__], "_MAX_RESIZED_PIXELS", 0)
    difference = np.abs(ours(image, spec) - whole)
    assert difference.max() <= 2
    assert np.count_nonzero(difference) < 0.06 * difference.size


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_drafted_photographs_are_close_to_whole_ones(orientation: int, interpolation: str) -> None:
    spec = Preprocess(resize=128, crop=(112, 112), interpolation=interpolation)
    # Neither side is a multiple of the divisor: a box that turned the wrong way would shift the
    # input.
    data = jpeg(Image.fromarray(pictures.coffee()).resize((1551, 1037), 3), orientation)
    drafted = decode(data, limits=DecodeLimits(), preprocess=spec)
    whole = decode(data, limits=DecodeLimits(), preprocess=Preprocess(resize=4096, crop=(224, 224)))
    assert drafted.drafted
    assert not whole.drafted
    got, geometry = preprocess(drafted, spec)
    expected, whole_geometry = preprocess(whole, spec)
    difference = np.abs(got.astype(int) - expected)
    assert difference.mean() < 0.5
    assert difference.max() <= 8
    assert geometry == whole_geometry


def test_the_draft_s_box_matters() -> None:
    """Guards the test above: without the fraction of a pixel the input would differ."""
    spec = Preprocess(resize=64, crop=(64, 64), interpolation="bilinear")
    image = Image.fromarray(pictures.coffee()).resize((1027, 1025), 3)
    drafted = decode(jpeg(image), limits=DecodeLimits(), preprocess=spec)
    assert drafted.image.size == (129, 129)
    whole = DecodedImage(
        image=drafted.image, width=1027, height=1025, box=(0, 0, 129, 129), drafted=True
    )
    right, wrong = (preprocess(p, spec)[0].astype(int) for p in (drafted, whole))
    expected = preprocess(picture(image), spec)[0]
    assert np.abs(right - expected).mean() < 0.8 * np.abs(wrong - expected).mean()


# ---------------------------------------------------------------- geometry


def test_geometry_of_a_landscape() -> None:
    _, geometry = preprocess(picture(resized(500, 375)), Preprocess(resize=256, crop=(224, 224)))
    # 341 x 256 after resizing; the crop's corner is (58, 16).
    assert geometry == Geometry(
        width=500,
        height=375,
        region=Region(
            x=58 * 500 / 341, y=16 * 375 / 256, width=224 * 500 / 341, height=224 * 375 / 256
        ),
        input_width=224,
        input_height=224,
    )


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (90, 61)], ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        Preprocess(resize=256, crop=(224, 224)),
        Preprocess(resize=(100, 180), crop=(90, 170)),
        Preprocess(resize=(96, 160), crop=(96, 160), fit="contain"),
        Preprocess(resize=(96, 160), crop=(90, 150), fit="cover"),
        Preprocess(resize=100, crop=(150, 140)),
    ],
    ids=str,
)
def test_a_spot_is_found_where_it_was_drawn(size: tuple[int, int], spec: Preprocess) -> None:
    width, height = size
    x, y = width * 0.45, height * 0.6
    across, down = np.arange(width) + 0.5 - x, np.arange(height)[:, None] + 0.5 - y
    spot = np.exp(-(across**2 + down**2) / (2 * (min(size) / 12) ** 2)) * 255
    image = Image.fromarray(spot.astype(np.uint8)).convert("RGB")
    values, geometry = preprocess(picture(image), spec)
    weights = values[..., 0].astype(float)
    weights[weights < 128] = 0  # neither padding nor tails
    columns, rows = np.meshgrid(np.arange(spec.crop[1]) + 0.5, np.arange(spec.crop[0]) + 0.5)
    seen = (weights * columns).sum() / weights.sum(), (weights * rows).sum() / weights.sum()
    assert to_original(geometry, *seen) == pytest.approx((x, y), abs=0.02 * max(size))
    assert to_input(geometry, x, y) == pytest.approx(seen, abs=0.5)


def test_a_padded_crop_reaches_beyond_the_picture() -> None:
    values, geometry = preprocess(picture(resized(60, 60)), Preprocess(resize=60, crop=(80, 81)))
    assert geometry.region == Region(x=-10, y=-10, width=81, height=80)
    assert (values[:10] == 0).all()
    assert np.array_equal(values[10:70, 10:70], np.asarray(resized(60, 60)))


@given(
    st.tuples(*[st.floats(-500, 500)] * 2),
    st.tuples(*[st.floats(1, 500)] * 2),
    st.tuples(*[st.floats(-1000, 1000)] * 2),
)
def test_mapping_there_and_back(
    corner: tuple[float, float], extent: tuple[float, float], point: tuple[float, float]
) -> None:
    geometry = Geometry(
        width=500,
        height=400,
        region=Region(x=corner[0], y=corner[1], width=extent[0], height=extent[1]),
        input_width=224,
        input_height=160,
    )
    there = to_original(geometry, *point)
    assert to_input(geometry, *there) == pytest.approx(point, abs=1e-6)
