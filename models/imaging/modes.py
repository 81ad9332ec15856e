"""Converts images of any mode of Pillow to RGB."""

from __future__ import annotations

from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """Make an image RGB, laid on white where it is transparent."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return on_white(rgba.convert("RGB"), rgba.getchannel("A"))
    # Pillow copies an image that is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def on_white(rgb: Image.Image, opacity: Image.Image) -> Image.Image:
    """Lay an RGB image on white with an opacity for each pixel, mode L."""
    background = Image.new("RGB", rgb.size, "white")
    background.paste(rgb, mask=opacity)
    return background
