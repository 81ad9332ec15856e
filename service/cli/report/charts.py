"""Small charts as SVG, in the colours of the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from models.imaging import png
from models.imaging.colormaps import COLORMAPS
from models.imaging.render import normalise, upsample
from service.cli.report.analysis import CalibrationBin

_SIDE = 240
_MARGIN = 28


def calibration_chart(bins: Sequence[CalibrationBin]) -> str:
    """Accuracy over confidence; on the diagonal the model is as sure as it is right."""
    inner = _SIDE - 2 * _MARGIN
    bars = "".join(
        f'<rect class="bar" x="{_MARGIN + item.low * inner:.1f}" '
        f'y="{_SIDE - _MARGIN - item.accuracy * inner:.1f}" '
        f'width="{(item.high - item.low) * inner - 2:.1f}" height="{item.accuracy * inner:.1f}">'
        f"<title>{item.count} images: confidence {item.confidence:.0%}, "
        f"accuracy {item.accuracy:.0%}</title></rect>"
        for item in bins
    )
    low, high = _MARGIN, _SIDE - _MARGIN
    return (
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="Accuracy over confidence">'
        f'{bars}<line class="axis" x1="{low}" y1="{high}" x2="{high}" y2="{high}"/>'
        f'<line class="axis" x1="{low}" y1="{low}" x2="{low}" y2="{high}"/>'
        f'<line class="diagonal" x1="{low}" y1="{high}" x2="{high}" y2="{low}"/>'
        f'<text x="{_SIDE / 2}" y="{_SIDE - 6}" text-anchor="middle">confidence</text>'
        f'<text transform="translate(12 {_SIDE / 2}) rotate(-90)" text-anchor="middle">accuracy'
        "</text></svg>"
    )


def interval_bar(value: float, low: float, high: float) -> str:
    """A share as a bar with its interval."""
    return (
        '<svg class="interval" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="8"/>'
        f'<rect class="bar" width="{100 * value:.1f}" height="8"/>'
        f'<line class="whisker" x1="{100 * low:.1f}" x2="{100 * high:.1f}" y1="4" y2="4"/></svg>'
    )


def map_image(values: Sequence[Sequence[float]], *, side: int = 160) -> str:
    """A mean map as a `data:` URL."""
    enlarged = upsample(np.asarray(values, np.float32), height=side, width=side)
    unit = normalise(enlarged, signed=False)
    levels = np.zeros((side, side), np.uint8) if unit is None else (unit * 255).astype(np.uint8)
    opaque = np.full(256, 255, np.uint8)
    data = png.encode_palette(levels, palette=COLORMAPS["turbo"], opacity=opaque)
    return "data:image/png;base64," + base64.b64encode(data).decode()
