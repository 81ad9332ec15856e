from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from skimage import data as pictures
from torch.nn import functional

from models.imaging.colormaps import COLORMAPS
from models.imaging.decode import DecodedImage, DecodeLimits, decode
from models.imaging.preprocess import preprocess
from models.imaging.render import (
    Canvas,
    encode_values,
    heatmap_png,
    input_canvas,
    normalise,
    original_canvas,
    overlay,
    quantise,
    shade,
    shrink,
    upsample,
)
from models.imaging.style import Style
from models.types import Geometry, Preprocess

SPEC = Preprocess(resize=256, crop=(224, 224))
COFFEE = Image.fromarray(pictures.coffee())
VALUES = st.floats(-1e3, 1e3, width=32)
MAPS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=14), elements=VALUES)


def plain(*, signed: bool = False, colormap: str = "turbo") -> Style:
    """A map is drawn as it is, with one opacity."""
    return Style(signed=signed, colormap=colormap, clip=0.0, fading=False)


def random_map(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def prepared(
    width: int, height: int, spec: Preprocess = SPEC
) -> tuple[DecodedImage, np.ndarray, Geometry]:
    image = COFFEE.resize((width, height), Image.Resampling.BICUBIC)
    picture = DecodedImage(
        image=image, width=width, height=height, box=(0, 0, width, height), drafted=False
    )
    return picture, *preprocess(picture, spec)


@pytest.fixture
def canvas() -> Canvas:
    return input_canvas(prepared(500, 375)[1])


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# ---------------------------------------------------------------- upsample


@pytest.mark.parametrize("shape", [(7, 7), (1, 1), (1, 5), (14, 9), (56, 56)])
@pytest.mark.parametrize("size", [(224, 224), (56, 56), (300, 451), (61, 100)])
def test_upsampling_equals_torch(shape: tuple[int, int], size: tuple[int, int]) -> None:
    values = random_map(*shape)
    expected = functional.interpolate(
        torch.from_numpy(values)[None, None], size, mode="bilinear", align_corners=False
    )
    got = upsample(values, height=size[0], width=size[1])
    assert got.dtype == np.float32
    assert got.shape == size
    # torch works out positions in float32: far from the corner they are as imprecise as these sizes
    # allow.
    precise = functional.interpolate(
        torch.from_numpy(values)[None, None].double(), size, mode="bilinear", align_corners=False
    )
    assert np.abs(got - precise[0, 0].numpy()).max() <= 1e-6 * np.abs(values).max()
    assert np.abs(got - expected[0, 0].numpy()).max() <= 2e-5


def test_upsampling_to_the_same_size_changes_nothing() -> None:
    values = random_map(224, 200)
    assert np.array_equal(upsample(values, height=224, width=200), values)


# ---------------------------------------------------------------- normalise


@given(MAPS)
def test_unsigned_maps_reach_both_ends(values: np.ndarray) -> None:
    assume(np.ptp(values) > 1e-4 * np.abs(values).max())
    unit = normalise(values, signed=False)
    assert unit is not None
    assert unit.dtype == np.float32
    assert unit.min() == 0
    assert unit.max() == 1
    exact = values.astype(np.float64)
    expected = (exact - exact.min()) / np.ptp(exact)
    rounding = np.finfo(np.float32).eps * np.abs(exact).max() / np.ptp(exact)
    assert np.abs(unit - expected).max() <= 4 * rounding + 1e-6


@given(MAPS)
def test_signed_maps_keep_zero_in_the_middle(values: np.ndarray) -> None:
    assume(np.ptp(values) > 1e-4 * np.abs(values).max())
    unit = normalise(values, signed=True)
    assert unit is not None
    expected = values.astype(np.float64) / np.abs(values).max() / 2 + 0.5
    assert np.abs(unit - expected).max() <= 1e-6
    assert max(unit.max() - 0.5, 0.5 - unit.min()) == 0.5
    assert (unit[values == 0] == 0.5).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-12, 1e30, 3e38])
def test_scale_does_not_matter(signed: bool, scale: float) -> None:
    values = np.array([[0, 1], [0.5, 1]], np.float64)
    if scale == 1e-45:
        values, scale = np.array([[0, 4], [2, 4]]), 2.0**-149  # the least steps of float32
    if signed:
        values = values * 2 - values.max()
    got = normalise((values * scale).astype(np.float32), signed=signed)
    assert got is not None
    assert np.allclose(got, [[0, 1], [0.5, 1]], atol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 1e-40, np.nan, np.inf, -np.inf])
def test_constant_maps_are_degenerate(signed: bool, value: float) -> None:
    values = np.full((7, 7), value, np.float32)
    assert normalise(values, signed=signed) is None
    if np.isfinite(value):
        # Interpolating a constant leaves rounding behind, which must not be blown up.
        assert normalise(upsample(values, height=225, width=223), signed=signed) is None
    assert shade(values, input_canvas(np.zeros((9, 9, 3), np.uint8)), plain(signed=signed)) is None


def test_rounding_to_float32_leads_no_value_off_the_scale() -> None:
    unit = normalise(np.array([[2, 3, 26 / 3]]), signed=False)
    assert unit is not None
    assert unit.max() == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_makes_a_map_degenerate(bad: float) -> None:
    values = random_map(7, 7)
    values[3, 3] = bad
    assert normalise(values, signed=False) is None


def test_an_empty_map_is_degenerate() -> None:
    assert normalise(np.zeros((0, 0), np.float32), signed=False) is None


# ---------------------------------------------------------------- heatmaps


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("colormap", COLORMAPS)
def test_heatmaps_hold_levels_colours_and_opacity(
    canvas: Canvas, signed: bool, colormap: str
) -> None:
    unit = shade(random_map(7, 7), canvas, plain(signed=signed))
    assert unit is not None
    image = opened(heatmap_png(quantise(unit), canvas, plain(colormap=colormap, signed=signed)))
    assert image.mode == "P"
    assert image.size == (224, 224)
    assert np.abs(np.asarray(image) - unit * 255).max() <= 0.5001
    assert np.array_equal(np.reshape(image.getpalette(), (256, 3)), COLORMAPS[colormap])


def test_opacity_grows_with_the_value(canvas: Canvas) -> None:
    ramp = np.linspace(0, 1, 224, dtype=np.float32)[None].repeat(224, axis=0)
    for signed in (False, True):
        data = heatmap_png(quantise(ramp), canvas, plain(signed=signed))
        opacity = np.asarray(opened(data).convert("RGBA"))[0, :, 3].astype(int)
        strength = opacity[112:] if signed else opacity
        assert (np.diff(strength) >= 0).all()
        assert strength[-1] > 200
        if signed:
            assert np.abs(opacity - opacity[::-1]).max() <= 2


@pytest.mark.parametrize("signed", [False, True])
def test_zero_is_transparent(canvas: Canvas, signed: bool) -> None:
    values = np.zeros((224, 224), np.float32)
    values[5, 7] = 2
    unit = shade(values, canvas, plain(signed=signed))
    data = heatmap_png(quantise(unit), canvas, plain(colormap="coolwarm", signed=signed))
    opacity = np.asarray(opened(data).convert("RGBA"))[..., 3]
    assert np.argwhere(opacity).tolist() == [[5, 7]]


@pytest.mark.parametrize("signed", [False, True])
def test_degenerate_heatmaps_are_transparent(canvas: Canvas, signed: bool) -> None:
    data = heatmap_png(None, canvas, plain(signed=signed))
    image = opened(data).convert("RGBA")
    assert image.size == (224, 224)
    assert np.asarray(image)[..., 3].max() == 0


# ---------------------------------------------------------------- overlays


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_overlays_blend(canvas: Canvas, alpha: float) -> None:
    unit = shade(random_map(7, 7), canvas, plain())
    assert unit is not None
    data = overlay(
        quantise(unit), canvas, plain(colormap="viridis"), alpha=alpha, image_format="png"
    )
    got = np.asarray(opened(data)).astype(float)
    colours = COLORMAPS["viridis"][np.rint(unit * 255).astype(int)]
    expected = (1 - alpha) * canvas.base + alpha * colours
    assert np.abs(got - expected).max() <= (1 if 0 < alpha < 1 else 0)


def test_brightness_does_not_depend_on_the_map(canvas: Canvas) -> None:
    """Where two maps agree, so do the pictures: the overlay is not rescaled by its own extremes."""
    one, two = np.zeros((2, 224, 224), np.float32)
    one[:100] = 1
    two[:10] = 1
    drawn = [
        np.asarray(
            opened(
                overlay(
                    quantise(unit), canvas, plain(colormap="jet"), alpha=0.5, image_format="png"
                )
            )
        )
        for unit in (one, two)
    ]
    assert np.array_equal(drawn[0][100:], drawn[1][100:])
    assert np.array_equal(drawn[0][:10], drawn[1][:10])


@pytest.mark.parametrize(
    ("image_format", "kind"), [("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
)
def test_overlay_formats(canvas: Canvas, image_format: str, kind: str) -> None:
    unit = shade(random_map(7, 7), canvas, plain())
    image = opened(overlay(quantise(unit), canvas, plain(), alpha=0.5, image_format=image_format))
    exact = opened(overlay(quantise(unit), canvas, plain(), alpha=0.5, image_format="png"))
    assert (image.format, image.mode, image.size) == (kind, "RGB", (224, 224))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(exact)).mean() < 6


def test_degenerate_overlays_are_the_picture(canvas: Canvas) -> None:
    data = overlay(None, canvas, plain(), alpha=0.5, image_format="png")
    assert np.array_equal(np.asarray(opened(data)), canvas.base)


# ---------------------------------------------------------------- the whole picture


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 375), (500, 375)),
        ((2048, 1000), (1024, 500)),
        ((999, 2000), (511, 1024)),
        ((30, 6000), (5, 1024)),
        ((2, 6000), (1, 1024)),
    ],
)
def test_the_whole_picture_is_never_scaled_up(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    picture, _, geometry = prepared(*size)
    canvas = original_canvas(shrink(picture), geometry)
    assert canvas.base.shape == (expected[1], expected[0], 3)
    if size == expected:
        assert np.array_equal(canvas.base, np.asarray(picture.image))


def test_a_drafted_picture_fills_its_canvas() -> None:
    buffer = io.BytesIO()
    COFFEE.resize((2401, 1601)).save(buffer, "JPEG", quality=95)
    picture = decode(buffer.getvalue(), limits=DecodeLimits(), preprocess=SPEC, keep_original=True)
    assert picture.drafted
    canvas = original_canvas(shrink(picture), preprocess(picture, SPEC)[1])
    expected = np.asarray(COFFEE.resize((2401, 1601)).resize((1024, 683), reducing_gap=2))
    assert canvas.base.shape == expected.shape
    assert np.abs(canvas.base.astype(int) - expected).mean() < 2


def sampled(values: np.ndarray, geometry: Geometry, height: int, width: int) -> np.ndarray:
    """A map at the pixels of a whole picture, by torch: NaN where the model did not see it."""
    region = geometry.region
    x = ((np.arange(width) + 0.5) * geometry.width / width - region.x) / region.width
    y = ((np.arange(height) + 0.5) * geometry.height / height - region.y) / region.height
    columns, rows = np.meshgrid(x, y)
    places = torch.from_numpy(np.dstack([columns, rows]) * 2 - 1)[None]
    field = functional.grid_sample(
        torch.from_numpy(values.astype(np.float64))[None, None],
        places,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )[0, 0].numpy()
    outside = (columns < 0) | (columns >= 1) | (rows < 0) | (rows >= 1)
    return np.where(outside, np.nan, field)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1500, 700), (61, 60)], ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        Preprocess(resize=(120, 200), crop=(100, 150)),
        Preprocess(resize=200, crop=(260, 230)),
        Preprocess(resize=(100, 160), crop=(100, 160), fit="contain"),
    ],
    ids=str,
)
def test_the_map_lies_where_the_crop_lay(size: tuple[int, int], spec: Preprocess) -> None:
    picture, _, geometry = prepared(*size, spec)
    canvas = original_canvas(shrink(picture), geometry)
    values = random_map(6, 8)
    expected = sampled(values, geometry, *canvas.base.shape[:2])
    seen = ~np.isnan(expected)
    window = np.zeros_like(seen)
    window[canvas.rows, canvas.columns] = True
    assert np.array_equal(window, seen)

    unit = shade(values, canvas, plain(signed=True))
    assert unit is not None
    inside = expected[seen].reshape(unit.shape)
    assert np.abs(unit - (inside / np.abs(inside).max() / 2 + 0.5)).max() <= 1e-5

    heatmap = opened(heatmap_png(quantise(unit), canvas, plain(colormap="coolwarm", signed=True)))
    assert heatmap.size == canvas.base.shape[1::-1]
    assert np.asarray(heatmap.convert("RGBA"))[..., 3][~seen].sum() == 0

    data = overlay(
        quantise(unit), canvas, plain(colormap="coolwarm"), alpha=1.0, image_format="png"
    )
    drawn = np.asarray(opened(data))
    assert np.array_equal(drawn[~seen], canvas.base[~seen])
    levels = np.rint(unit * 255).astype(int)
    assert np.array_equal(drawn[canvas.rows, canvas.columns], COLORMAPS["coolwarm"][levels])


# ---------------------------------------------------------------- values and threads


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_values_are_little_endian_and_row_major(dtype: object) -> None:
    values = random_map(5, 3).T.astype(dtype)
    shape, raw = encode_values(values)
    text = base64.b64encode(raw)
    decoded = np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)
    assert shape == (3, 5)
    assert np.array_equal(decoded, values.astype(np.float32))


def test_nothing_is_changed_and_threads_agree(canvas: Canvas) -> None:
    canvas.base.setflags(write=False)
    maps = [random_map(7, 7, seed=i) for i in range(24)]
    for values in maps:
        values.setflags(write=False)

    def draw(values: np.ndarray) -> tuple[bytes, bytes]:
        unit = shade(values, canvas, plain())
        return (
            heatmap_png(quantise(unit), canvas, plain()),
            overlay(quantise(unit), canvas, plain(), alpha=0.5, image_format="jpeg"),
        )

    expected = [draw(values) for values in maps]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(draw, maps)) == expected
