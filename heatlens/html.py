"""How results look in a notebook."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from heatlens.results import Explanation, Prediction, Result

_STYLE = "display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start;margin:4px 0"


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def result(shown: Result) -> str:
    """The predictions of one image as bars, and its explanations as pictures."""
    if shown.error is not None:
        return f"<p><b>{escape(shown.error.code)}</b>: {escape(shown.error.error)}</p>"
    bars = "".join(_bar(prediction) for prediction in shown.predictions)
    figures = "".join(_figure(explanation) for explanation in shown.explanations)
    return f'<div style="{_STYLE}"><div style="min-width:220px">{bars}</div>{figures}</div>'


def _bar(prediction: Prediction) -> str:
    percent = 100 * prediction.probability
    return (
        f'<div style="margin-bottom:4px"><span style="float:right">{percent:.1f} %</span>'
        f"{escape(prediction.label)}"
        f'<div style="background:#8884;height:4px;border-radius:2px">'
        f'<div style="background:#3b82f6;height:4px;border-radius:2px;width:{percent:.1f}%">'
        "</div></div></div>"
    )


def _figure(explanation: Explanation) -> str:
    picture = explanation.overlay or explanation.heatmap
    if picture is None:
        return ""
    source = base64.b64encode(png(picture)).decode()
    label = escape(explanation.target.label)
    caption = f"{label}<br><small>{escape(explanation.method)}, {escape(explanation.layer)}</small>"
    return (
        f'<figure style="margin:0"><img alt="{label}" style="max-width:260px" '
        f'src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'
    )
