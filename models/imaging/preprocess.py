"""From an image to the model input, exactly as the library that trained the model does it.

Equal bit for bit to torchvision's `Resize` + `CenterCrop` on PIL images and to timm's
`create_transform` (crop modes `center`, `squash`, `border`), rounding included. Two kinds of
image are only close: large photographs that were decoded at a reduced size, and images of such
a shape that the whole of them, resized, would fill the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from models.errors import InvalidOption
from models.image_types import Centre
from models.imaging import resampling
from models.imaging.decode import DecodedImage
from models.types import Geometry, Preprocess, Region

_FILTERS: Mapping[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Of higher images Pillow resizes the columns first.
_RATIO = 2

# An image of extreme shape would be resized to a huge one, of which only the crop is used.
_MAX_RESIZED_PIXELS = 16_000_000


class _Plan(NamedTuple):
    """Size after resizing, and the crop's corner in it, negative where the crop is padded."""

    width: int
    height: int
    left: int
    top: int


def preprocess(image: DecodedImage, spec: Preprocess) -> tuple[np.ndarray, Geometry]:
    """Resize and crop an image.

    Returns:
        The model input, and where it lies in the original. The input is pixels before normalising,
        uint8 (crop height, crop width, channels); for networks that take samples as stored it is
        normalised, float32 (channels, crop height, crop width). The region extends beyond the image
        where the crop had to be padded.
    """
    crop_height, crop_width = spec.crop
    plan = _plan(image.width, image.height, spec)
    scale_x, scale_y = image.width / plan.width, image.height / plan.height
    geometry = Geometry(
        width=image.width,
        height=image.height,
        region=Region(
            x=plan.left * scale_x,
            y=plan.top * scale_y,
            width=crop_width * scale_x,
            height=crop_height * scale_y,
        ),
        input_width=crop_width,
        input_height=crop_height,
    )
    if not spec.raw and spec.channels == 3:
        return _picture(image, plan, spec), geometry
    if not spec.raw:
        grey = _cut(image, image.image.convert("L"), plan, spec)
        return np.array(grey)[..., None], geometry
    bands = image.bands[::-1] if spec.order == "bgr" else image.bands
    cut = [np.asarray(_cut(image, band, plan, spec, i)) for i, band in enumerate(bands)]
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
    return (np.stack(cut) / np.float32(255) - mean) / std, geometry


def picture(image: DecodedImage, spec: Preprocess) -> np.ndarray:
    """What the model saw as a picture, uint8 (crop height, crop width, 3)."""
    return _picture(image, _plan(image.width, image.height, spec), spec)


def take_normalised(values: np.ndarray, spec: Preprocess) -> tuple[np.ndarray, Geometry]:
    """Check a model input that its sender has resized and normalised, float32 (channels, H, W).

    Returns:
        The input, and its geometry: it is the whole of the image.

    Raises:
        InvalidOption: it is not of the model's size, or not finite.
    """
    height, width = spec.crop
    if values.shape != (spec.channels, height, width):
        shape = f"{spec.channels} x {height} x {width}"
        raise InvalidOption(f"The model takes normalised values of shape {shape}.")
    if not np.isfinite(values).all():
        raise InvalidOption("The normalised values are not all finite.")
    region = Region(x=0, y=0, width=width, height=height)
    return values, Geometry(
        width=width, height=height, region=region, input_width=width, input_height=height
    )


def to_original(geometry: Geometry, x: float, y: float) -> tuple[float, float]:
    """Map a point of the model input to the original image.

    Coordinates are continuous: pixel i covers [i, i + 1), its centre is i + 0.5.
    """
    region = geometry.region
    return (
        region.x + x * region.width / geometry.input_width,
        region.y + y * region.height / geometry.input_height,
    )


def to_input(geometry: Geometry, x: float, y: float) -> tuple[float, float]:
    """Map a point of the original image to the model input; the inverse of `to_original`."""
    region = geometry.region
    return (
        (x - region.x) * geometry.input_width / region.width,
        (y - region.y) * geometry.input_height / region.height,
    )


def _plan(width: int, height: int, spec: Preprocess) -> _Plan:
    resized_width, resized_height = _resized_size(width, height, spec)
    crop_height, crop_width = spec.crop
    return _Plan(
        width=resized_width,
        height=resized_height,
        left=_offset(resized_width, crop_width, spec.centre),
        top=_offset(resized_height, crop_height, spec.centre),
    )


def _resized_size(width: int, height: int, spec: Preprocess) -> tuple[int, int]:
    if spec.fit == "none":
        return width, height
    if isinstance(spec.resize, int):
        # torchvision cuts the long side down to whole pixels.
        long_side = int(spec.resize * max(width, height) / min(width, height))
        return (spec.resize, long_side) if width <= height else (long_side, spec.resize)
    target_height, target_width = spec.resize
    if spec.fit == "stretch":
        return target_width, target_height
    pick = min if spec.fit == "cover" else max
    ratio = pick(height / target_height, width / target_width)
    # timm rounds.
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _offset(resized: int, crop: int, centre: Centre) -> int:
    """Corner of a centred crop; torchvision rounds halves to even and pads less at the start."""
    if resized < crop:
        return -((crop - resized) // 2)
    return (resized - crop) // 2 if centre == "down" else round((resized - crop) / 2.0)


def _picture(image: DecodedImage, plan: _Plan, spec: Preprocess) -> np.ndarray:
    (height, width), part = spec.crop, _part(plan, spec)
    is_filled = part == (plan.left, plan.top, plan.left + width, plan.top + height)
    is_scaled = spec.fit != "none" and isinstance(spec.resize, int)
    is_by_rows = is_scaled and image.height <= _RATIO * image.width
    if is_filled and is_by_rows and _is_resized_whole(image, plan):
        size, resample = (plan.width, plan.height), _FILTERS[spec.interpolation]
        found = resampling.resize_part(image.image, size, resample, part)
        if found is not None:
            return found
    return np.array(_cut(image, image.image, plan, spec))


def _cut(
    image: DecodedImage, pixels: Image.Image, plan: _Plan, spec: Preprocess, channel: int = 0
) -> Image.Image:
    """The crop of an image's pixels, or of those of one channel, padded where they end."""
    crop_height, crop_width = spec.crop
    resized = _resize_inside(image, pixels, plan, spec)
    if resized.size == (crop_width, crop_height):
        return resized
    levels = _padding(spec)
    colour: float | tuple[int, ...] = levels[channel]
    if pixels.mode != "F":
        whole = tuple(map(round, levels[::-1] if spec.order == "bgr" else levels))
        colour = whole[channel] if pixels.mode == "L" else (whole * 3)[:3]
    canvas = Image.new(pixels.mode, (crop_width, crop_height), colour)
    canvas.paste(resized, (max(0, -plan.left), max(0, -plan.top)))
    return canvas


def _padding(spec: Preprocess) -> tuple[float, ...]:
    """Levels around an image that does not fill the crop, one for each channel of the network."""
    if spec.fit != "contain":
        return (0.0,) * spec.channels
    if spec.padding is not None:
        return (float(spec.padding),) * spec.channels
    return tuple(255 * min(max(mean, 0.0), 1.0) for mean in spec.mean)


def _part(plan: _Plan, spec: Preprocess) -> tuple[int, int, int, int]:
    """The part of the resized image that lies inside the crop: left, top, right, bottom."""
    crop_height, crop_width = spec.crop
    return (
        max(0, plan.left),
        max(0, plan.top),
        min(plan.width, plan.left + crop_width),
        min(plan.height, plan.top + crop_height),
    )


def _is_resized_whole(image: DecodedImage, plan: _Plan) -> bool:
    """Whether the crop is, to the bit, a part of the resized image."""
    return not image.drafted and plan.width * plan.height <= _MAX_RESIZED_PIXELS


def _resize_inside(
    image: DecodedImage, pixels: Image.Image, plan: _Plan, spec: Preprocess
) -> Image.Image:
    """The part of the crop that lies inside the resized image."""
    resample = _FILTERS[spec.interpolation]
    part = left, top, right, bottom = _part(plan, spec)
    if _is_resized_whole(image, plan):
        return pixels.resize((plan.width, plan.height), resample).crop(part)
    # Straight from the crop's box to the input takes half the time, but Pillow rounds boxes to
    # float32: up to two levels off, at up to 6 % of the values (measured; where sizes have simple
    # ratios, many values are close to ties).
    x0, y0, x1, y1 = image.box
    scale_x, scale_y = (x1 - x0) / plan.width, (y1 - y0) / plan.height
    box = (
        x0 + left * scale_x,
        y0 + top * scale_y,
        min(x1, x0 + right * scale_x),
        min(y1, y0 + bottom * scale_y),
    )
    return pixels.resize((right - left, bottom - top), resample, box=box)
