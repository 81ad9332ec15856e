"""From maps to heatmaps and overlays: upsample, normalise, colour, blend, encode.

A map is brought to the size of its canvas first and normalised after that, so that the image
reaches both ends of the colour scale. No function changes what it is given; all may run in several
threads at once.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from models.imaging import png
from models.imaging.colormaps import COLORMAPS
from models.imaging.decode import DecodedImage
from models.imaging.jpeg import CANVAS_SIDE
from models.imaging.style import Style
from models.types import Geometry

OverlayFormat = Literal["jpeg", "png", "webp"]

# Opacity of a heatmap's strongest value: the image below stays visible.
_PEAK_OPACITY = 0.85
# The greatest opacity of an overlay that fades is alpha to this power: 0.84 for an alpha of 0.5. To
# be seen, a single pixel must be more opaque than an area.
_FADE_ALPHA = 0.25
_JPEG_QUALITY = 85
_WEBP_QUALITY = 80

# Share of its magnitude by which a constant map may vary: four roundings of float32.
_ROUNDING = 4 * 2.0**-23

# Magnitudes whose differences and quotients stay normal numbers of float32.
_SAFE_MIN, _SAFE_MAX = 1e-30, 1e30


@dataclass(frozen=True, slots=True)
class Canvas:
    """What a map is drawn on, and where on it.

    Attributes:
        base: the image, uint8 (height, width, 3).
        rows, columns: the pixels of `base` that the model saw.
        span_y, span_x: where these pixels begin and end in the model's view, as fractions of it;
            (0, 1) is all of it.
    """

    base: np.ndarray
    rows: slice
    columns: slice
    span_y: tuple[float, float] = (0.0, 1.0)
    span_x: tuple[float, float] = (0.0, 1.0)


def input_canvas(model_input: np.ndarray) -> Canvas:
    """Draw on the model's crop, uint8 (H, W, 3)."""
    height, width = model_input.shape[:2]
    return Canvas(base=model_input, rows=slice(0, height), columns=slice(0, width))


def shrink(image: DecodedImage) -> np.ndarray:
    """The whole image, uint8 (h, w, 3), scaled to at most `CANVAS_SIDE` pixels a side, never up."""
    scale = min(1.0, CANVAS_SIDE / max(image.width, image.height))
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    bicubic = Image.Resampling.BICUBIC
    return np.array(image.image.resize((width, height), bicubic, box=image.box, reducing_gap=2.0))


def original_canvas(base: np.ndarray, geometry: Geometry) -> Canvas:
    """Draw on the whole image, as `shrink` made it.

    The map lies on the pixels whose centre the model saw.
    """
    height, width = base.shape[:2]
    region = geometry.region
    rows, span_y = _window(height, region.y / geometry.height, region.height / geometry.height)
    columns, span_x = _window(width, region.x / geometry.width, region.width / geometry.width)
    return Canvas(base=base, rows=rows, columns=columns, span_y=span_y, span_x=span_x)


def upsample(values: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Enlarge a map (h, w) to float32 (height, width).

    Bilinear between pixel centres (torch's `interpolate` with `align_corners=False`).
    """
    rows, columns = values.shape
    return _enlarge(values, _whole_weights(rows, height), _whole_weights(columns, width))


def is_degenerate(values: np.ndarray) -> bool:
    """Whether a map shows nothing: it is empty, not finite, or constant up to rounding."""
    return _is_constant(*_extremes(values))


def normalise(values: np.ndarray, *, signed: bool) -> np.ndarray | None:
    """Scale a map to float32 [0, 1], or None if it is degenerate.

    Unsigned maps go from their least value (0) to their greatest (1). Signed maps are divided by
    their greatest magnitude: 0.5 is zero, 1 speaks for the class, 0 against it. No epsilon is added
    anywhere, so maps of tiny values keep their contrast.
    """
    low, high = _extremes(values)
    if _is_constant(low, high):
        return None
    greatest = max(abs(low), abs(high))
    if not _SAFE_MIN < greatest < _SAFE_MAX:
        values = values.astype(np.float64) / greatest
        low, high, greatest = low / greatest, high / greatest, 1.0
    unit: np.ndarray = values.astype(np.float32, copy=False)
    # In place: to map fresh memory costs more than to compute.
    if signed:
        unit = unit / np.float32(2 * greatest)
        unit += np.float32(0.5)
    else:
        unit = unit - np.float32(low)
        unit /= np.float32(high - low)
    # Rounding keeps the order: only what was rounded to float32 itself may have left the scale.
    return unit if values.dtype == np.float32 else np.clip(unit, 0.0, 1.0, out=unit)


def shade(values: np.ndarray, canvas: Canvas, style: Style) -> np.ndarray | None:
    """Enlarge a raw map (h, w) to the canvas's window and normalise it; None if degenerate.

    The share `style.clip` of the strongest values reach the ends of the scale.
    """
    height = canvas.rows.stop - canvas.rows.start
    width = canvas.columns.stop - canvas.columns.start
    if height <= 0 or width <= 0 or is_degenerate(values):
        return None
    enlarged = _enlarge(
        values,
        _span_weights(values.shape[0], height, canvas.span_y),
        _span_weights(values.shape[1], width, canvas.span_x),
    )
    return normalise(_clipped(enlarged, style), signed=style.signed)


def quantise(unit: np.ndarray | None) -> np.ndarray | None:
    """What `shade` returned as levels of the colour scale, uint8 (h, w); None stays None."""
    if unit is None:
        return None
    levels = np.empty(unit.shape, np.uint8)
    return np.rint(unit * np.float32(255), out=levels, casting="unsafe")


def heatmap_png(levels: np.ndarray | None, canvas: Canvas, style: Style) -> bytes:
    """Draw a heatmap over the canvas: 8-bit palette PNG whose opacity grows with the value.

    `levels` fill the canvas's window; None gives a transparent image. In signed maps 128 is zero,
    and opacity grows with the distance from it.
    """
    # Half of 255 rounds to 128, the index of zero in a signed map.
    indices = np.full(canvas.base.shape[:2], 128 if style.signed else 0, np.uint8)
    if levels is not None:
        indices[canvas.rows, canvas.columns] = levels
    return png.encode_palette(
        indices, palette=COLORMAPS[style.colormap], opacity=_opacity(style.signed)
    )


def overlay(
    levels: np.ndarray | None,
    canvas: Canvas,
    style: Style,
    *,
    alpha: float,
    image_format: OverlayFormat,
) -> bytes:
    """Blend a map with its canvas and encode the result.

    Each pixel of the window becomes (1 - a) * image + a * colour. Opacity a is `alpha`, so that how
    bright the image looks does not depend on the map. If the style is fading, a grows with the
    strength of the value, so that the image is left as it is where the map says nothing. Outside
    the window, which `levels` fill, and without a map (`levels` are None) the image is always left
    as it is. JPEG has quality 85, WebP quality 80.
    """
    image = Image.fromarray(canvas.base)
    if levels is not None:
        coloured = Image.fromarray(levels)
        coloured.putpalette(COLORMAPS[style.colormap].tobytes())
        corner = (canvas.columns.start, canvas.rows.start)
        is_whole = coloured.size == image.size
        box = (*corner, canvas.columns.stop, canvas.rows.stop)
        window = image if is_whole else image.crop(box)
        colours = coloured.convert("RGB")
        if style.fading:
            opacity = Image.fromarray(np.take(_fade(alpha, style.signed), levels))
            drawn = Image.composite(colours, window, opacity)
        else:
            drawn = Image.blend(window, colours, alpha)
        if is_whole:
            image = drawn
        else:
            image.paste(drawn, corner)
    return _encode(image, image_format)


def encode_values(values: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    """Shape and row-major little-endian float32 bytes of a map."""
    return values.shape, np.ascontiguousarray(values, dtype="<f4").tobytes()


def _clipped(values: np.ndarray, style: Style) -> np.ndarray:
    """Cut the strongest values to the strength of the next one."""
    count = int(style.clip * values.size)
    if count == 0:
        return values
    strength = np.abs(values) if style.signed else values
    rank = strength.size - 1 - count
    limit = np.partition(strength, rank, axis=None)[rank]
    # A map of which so few values say anything keeps them all.
    if limit <= (0 if style.signed else values.min()):
        return values
    clipped: np.ndarray = np.clip(values, -limit if style.signed else None, limit)
    return clipped


def _extremes(values: np.ndarray) -> tuple[float, float]:
    return float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))


def _is_constant(low: float, high: float) -> bool:
    greatest = max(abs(low), abs(high))
    return not math.isfinite(greatest) or high - low <= _ROUNDING * greatest


def _window(size: int, start: float, length: float) -> tuple[slice, tuple[float, float]]:
    """Pixels of an axis whose centre lies in a stretch, and where in it they begin and end.

    The axis has `size` pixels; start and length of the stretch are fractions of it, and may reach
    beyond its ends.
    """
    first = min(size, max(0, int(np.ceil(start * size - 0.5))))
    last = min(size, max(first, int(np.ceil((start + length) * size - 0.5))))
    return slice(first, last), ((first / size - start) / length, (last / size - start) / length)


def _enlarge(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    enlarged: np.ndarray = rows @ values.astype(np.float32, copy=False) @ columns.T
    return enlarged


def _span_weights(source: int, target: int, span: tuple[float, float]) -> np.ndarray:
    # Windows of original images differ from request to request: only whole views are kept.
    return _whole_weights(source, target) if span == (0.0, 1.0) else _weights(source, target, span)


@lru_cache(maxsize=32)
def _whole_weights(source: int, target: int) -> np.ndarray:
    weights = _weights(source, target, (0.0, 1.0))
    weights.setflags(write=False)
    return weights


def _weights(source: int, target: int, span: tuple[float, float]) -> np.ndarray:
    """Matrix (target, source) that interpolates at the centres of `target` pixels of a span."""
    start, stop = span
    centres = start + (np.arange(target) + 0.5) * ((stop - start) / target)
    position = np.clip(centres * source - 0.5, 0, source - 1)
    low = np.floor(position).astype(np.intp)
    share = position - low
    weights = np.zeros((target, source), np.float32)
    row = np.arange(target)
    weights[row, low] = 1 - share
    weights[row, np.minimum(low + 1, source - 1)] += share
    return weights


def _strength(signed: bool) -> np.ndarray:
    """How far each palette index is from nothing, 0 to 1, (256,)."""
    index = np.arange(256)
    return np.minimum(1.0, np.abs(index - 128) / 127) if signed else index / 255


def _fade(alpha: float, signed: bool) -> np.ndarray:
    """Opacity of each palette index in an overlay that fades, uint8 (256,)."""
    opacity = 255 * alpha**_FADE_ALPHA * _strength(signed)
    return np.asarray(np.rint(opacity).astype(np.uint8))


@lru_cache(maxsize=2)
def _opacity(signed: bool) -> np.ndarray:
    """Opacity of each palette index of a heatmap, uint8 (256,)."""
    opacity = np.rint(_strength(signed) * (255 * _PEAK_OPACITY)).astype(np.uint8)
    opacity.setflags(write=False)
    return opacity


def _encode(image: Image.Image, image_format: OverlayFormat) -> bytes:
    if image_format == "png":
        return png.encode_rgb(np.asarray(image))
    buffer = io.BytesIO()
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    else:
        image.save(buffer, "WEBP", quality=_WEBP_QUALITY, method=0)
    return buffer.getvalue()
