"""Images of Pillow's modes to RGB."""

from __future__ import annotations

from PIL import Image

from models.errors import UnsupportedMediaType


def to_rgb(image: Image.Image) -> Image.Image:
    """Make an image RGB, laid on white where it is transparent.

    Raises:
        UnsupportedMediaType: a mode that Pillow cannot convert.
    """
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return on_white(rgba.convert("RGB"), rgba.getchannel("A"))
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UnsupportedMediaType(
            f"Images of mode {image.mode} are not read; save the image as 8-bit RGB."
        ) from error


def on_white(rgb: Image.Image, opacity: Image.Image) -> Image.Image:
    """Lay an RGB image on white with an opacity for each pixel, mode L."""
    background = Image.new("RGB", rgb.size, "white")
    background.paste(rgb, mask=opacity)
    return background
