"""How maps of layers, of single pixels and signed ones are drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data as pictures

from models.imaging.colormaps import COLORMAPS
from models.imaging.render import Canvas, input_canvas, overlay, quantise, shade
from models.imaging.style import Style, style_of


def plain(*, signed: bool) -> Style:
    """A map is drawn as it is, with one opacity."""
    return Style(signed=signed, colormap="turbo", clip=0.0, fading=False)


def random_map(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def canvas() -> Canvas:
    return input_canvas(np.asarray(Image.fromarray(pictures.coffee()).resize((224, 224))))


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize(
    ("signed", "of_pixels", "expected"),
    [
        (False, False, Style(signed=False, colormap="turbo", clip=0.0, fading=False)),
        (True, False, Style(signed=True, colormap="coolwarm", clip=0.0, fading=True)),
        (False, True, Style(signed=False, colormap="turbo", clip=0.01, fading=True)),
        (True, True, Style(signed=True, colormap="coolwarm", clip=0.01, fading=True)),
    ],
)
def test_styles_suit_their_maps(signed: bool, of_pixels: bool, expected: Style) -> None:
    assert style_of(signed=signed, of_pixels=of_pixels) == expected


def test_what_is_asked_for_beats_the_style() -> None:
    style = style_of(signed=True, of_pixels=True, colormap="gray", clip=0.0)
    assert (style.colormap, style.clip) == ("gray", 0.0)


@pytest.mark.parametrize("signed", [False, True])
def test_the_strongest_values_saturate(canvas: Canvas, signed: bool) -> None:
    """One pixel that is a thousand times stronger than all others does not hide them."""
    values = np.abs(random_map(224, 224))
    values[3, 5] = 1000 * values.max()
    if signed:
        values *= np.sign(random_map(224, 224, seed=1))
    untouched = values.copy()
    shares = {}
    for clip in (0.0, 0.01, 0.1):
        unit = shade(values, canvas, Style(signed=signed, colormap="turbo", clip=clip, fading=True))
        assert unit is not None
        strength = np.abs(unit * 2 - 1) if signed else unit
        shares[clip] = np.mean(strength > 0.999)
        assert (np.median(strength) < 0.01) == (clip == 0)
    assert shares == {0.0: pytest.approx(0, abs=1e-4), 0.01: pytest.approx(0.01, abs=1e-3),
                      0.1: pytest.approx(0.1, abs=1e-3)}  # fmt: skip
    assert np.array_equal(values, untouched)


@pytest.mark.parametrize("signed", [False, True])
def test_a_map_of_few_values_keeps_them(canvas: Canvas, signed: bool) -> None:
    values = np.zeros((224, 224), np.float32)
    values[:3, :3] = np.arange(1, 10).reshape(3, 3)
    style = Style(signed=signed, colormap="turbo", clip=0.01, fading=True)
    unit = shade(values, canvas, style)
    whole = shade(values, canvas, plain(signed=signed))
    assert unit is not None
    assert np.array_equal(unit, whole)


@pytest.mark.parametrize("signed", [False, True])
def test_fading_overlays_leave_the_image_where_nothing_is_said(
    canvas: Canvas, signed: bool
) -> None:
    values = np.zeros((224, 224), np.float32)
    values[100:, :100] = np.linspace(0, 1, 100)
    if signed:
        values[:100, 100:] = -1
    style = style_of(signed=signed, of_pixels=True, clip=0.0)
    unit = shade(values, canvas, style)
    drawn = np.asarray(
        opened(overlay(quantise(unit), canvas, style, alpha=0.5, image_format="png"))
    )
    assert np.array_equal(drawn[values == 0], canvas.base[values == 0])
    colours = COLORMAPS[style.colormap].astype(int)
    distance = np.abs(drawn.astype(int) - colours[-1]).sum(-1)
    assert np.median(distance[100:, 95:100]) < np.median(distance[100:, 20:25])
    if signed:
        against = np.abs(drawn[:100, 100:] - colours[0]).mean()
        assert against < np.abs(canvas.base[:100, 100:] - colours[0]).mean() / 2


@pytest.mark.parametrize("signed", [False, True])
def test_alpha_scales_what_fades(canvas: Canvas, signed: bool) -> None:
    style = style_of(signed=signed, of_pixels=True)
    unit = shade(random_map(224, 224), canvas, style)
    changes = []
    for alpha in (0.0, 0.25, 0.5, 1.0):
        drawn = opened(overlay(quantise(unit), canvas, style, alpha=alpha, image_format="png"))
        changes.append(np.abs(np.asarray(drawn).astype(int) - canvas.base).mean())
    assert changes[0] == 0
    assert changes == sorted(changes)
