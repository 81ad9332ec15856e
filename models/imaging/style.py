"""How the maps of a method are drawn: colours, contrast and opacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.imaging.colormaps import Colormap

ColormapChoice = Literal["auto", Colormap]
ClipChoice = float | Literal["auto"]

MAX_CLIP = 0.1
"""Largest share of the strongest values that a picture may saturate."""

# A few single pixels are far stronger than all others: without this the rest would be invisible.
_PIXEL_CLIP = 0.01


@dataclass(frozen=True, slots=True)
class Style:
    """How the maps of a method are drawn.

    Attributes:
        signed: whether negative values mean something else than little.
        colormap: name of the colour table.
        clip: share of the strongest values that saturate.
        fading: whether an overlay is transparent where the map says nothing.
    """

    signed: bool
    colormap: Colormap
    clip: float
    fading: bool


def style_of(
    *,
    signed: bool,
    of_pixels: bool,
    colormap: ColormapChoice = "auto",
    clip: ClipChoice = "auto",
) -> Style:
    """Choose what is left to choose.

    Args:
        signed: whether negative values of the map mean something else than little.
        of_pixels: whether it is a map of single pixels, not of a layer.
        colormap: name of the colour table, or `auto`.
        clip: share of the strongest values that saturate, or `auto`.
    """
    if colormap == "auto":
        colormap = "coolwarm" if signed else "turbo"
    if clip == "auto":
        clip = _PIXEL_CLIP if of_pixels else 0.0
    return Style(signed=signed, colormap=colormap, clip=clip, fading=signed or of_pixels)
