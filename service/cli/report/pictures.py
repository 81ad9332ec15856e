"""The pictures of a report: overlays of confident errors and of typical images, and mean maps."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import heatlens
from models.imaging import png
from models.imaging.colormaps import COLORMAPS
from models.imaging.render import normalise, upsample
from models.types import Struct
from service.cli.report.clusters import Cluster
from service.cli.report.records import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from heatlens import AsyncClient
    from heatlens.results import Explanation

MOST_ERRORS = 12
TYPICAL = 6
_SIDE = 200
_MAP_SIDE = 160
# A mark that the map lies on must be legible under it.
_ALPHA = 0.4


class Picture(Struct):
    """A captioned picture, as a `data:` URL."""

    caption: str
    source: str


class Shown(Struct):
    """One image with its pictures."""

    record: Record
    pictures: tuple[Picture, ...]


async def error_pictures(
    client: AsyncClient, errors: Sequence[Record], *, folder: Path, options: dict[str, Any]
) -> list[Shown]:
    """The most confident errors: why this class, why not that, and what decides between them."""
    worst = sorted(errors, key=lambda record: -record.confidence)[:MOST_ERRORS]
    captions = (
        "what the model saw",
        "why it was predicted",
        "what speaks for the true class",
        "the one against the other",
    )
    shown = []
    for record in worst:
        contrast = {"class": record.predicted, "against": [record.class_id]}
        targets = [record.predicted, record.class_id, contrast]
        maps = [
            *await _overlays(client, record, folder, options | {"targets": targets[:1]}, alpha=0.0),
            *await _overlays(client, record, folder, options | {"targets": targets}),
        ]
        pictures = [
            _picture(caption, item.overlay)
            for caption, item in zip(captions, maps, strict=False)
            if item.overlay is not None
        ]
        shown.append(Shown(record=record, pictures=tuple(pictures)))
    return shown


async def cluster_pictures(
    client: AsyncClient,
    cluster: Cluster,
    records: Sequence[Record],
    *,
    folder: Path,
    options: dict[str, Any],
) -> list[Shown]:
    """Typical images of a cluster, with the map of their predicted class."""
    shown = []
    for index in cluster.members[:TYPICAL]:
        record = records[index]
        maps = await _overlays(client, record, folder, options | {"targets": [record.predicted]})
        pictures = [_picture("", item.overlay) for item in maps if item.overlay is not None]
        shown.append(Shown(record=record, pictures=tuple(pictures)))
    return shown


def map_image(values: Sequence[Sequence[float]]) -> str:
    """A mean map as a `data:` URL."""
    enlarged = upsample(np.asarray(values, np.float32), height=_MAP_SIDE, width=_MAP_SIDE)
    unit = normalise(enlarged, signed=False)
    levels = np.zeros(enlarged.shape) if unit is None else unit * 255
    opaque = np.full(256, 255, np.uint8)
    data = png.encode_palette(levels.astype(np.uint8), palette=COLORMAPS["turbo"], opacity=opaque)
    return "data:image/png;base64," + base64.b64encode(data).decode()


async def _overlays(
    client: AsyncClient,
    record: Record,
    folder: Path,
    options: dict[str, Any],
    *,
    alpha: float = _ALPHA,
) -> list[Explanation]:
    try:
        response = await client.explain(
            folder / record.path, outputs=["overlay"], alpha=alpha, statistics=False, **options
        )
    except (heatlens.APIError, OSError):
        return []
    return response.explanations


def _picture(caption: str, overlay: Any) -> Picture:
    small = overlay.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(caption=caption, source=source)
