"""The numbers of a report: accuracy, calibration, confusions, and where the attribution lies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from models.types import Struct
from service.cli.report.records import Record

_BINS = 10
_Z = 1.959964
FRAME = 0.1
"""Width of the border, as a share of the input's side."""


class Proportion(Struct):
    """A share with its 95 % interval (Wilson, 1927)."""

    count: int
    total: int
    value: float
    low: float
    high: float


class ClassRow(Struct):
    """One class: recall of its images, precision of its predictions."""

    class_id: int
    label: str
    images: int
    recall: Proportion
    precision: Proportion
    confidence: float


class Confusion(Struct):
    """How often one class was taken for another."""

    true: str
    predicted: str
    count: int


class CalibrationBin(Struct):
    """The predictions of one range of confidence."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


class Calibration(Struct):
    """Calibration of the confidence.

    Attributes:
        ece: expected calibration error: the mean gap between confidence and accuracy over ten equal
            ranges of confidence, weighted by their predictions (Guo et al. 2017, eq. 3).
    """

    ece: float
    bins: tuple[CalibrationBin, ...]


class Attribution(Struct):
    """Where the positive attribution lies, as mean shares over the images.

    Attributes:
        border: in the outer tenth of the model's input on each side; `border_area` is the share
            that an even map has there.
        box: within the boxes of the objects; `box_area` is the share that an even map has there.
        box_cut: share of the boxes that the crop cut off.
        unseen: share of the images outside the crop, which no map can show.
    """

    border: float
    border_area: float
    box: float | None
    box_area: float | None
    box_cut: float | None
    unseen: float


def proportion(count: int, total: int) -> Proportion:
    """A share with its Wilson interval; of nothing, anything from 0 to 1 is possible."""
    if total == 0:
        return Proportion(count=0, total=0, value=0.0, low=0.0, high=1.0)
    share, squared = count / total, _Z * _Z / total
    centre = (share + squared / 2) / (1 + squared)
    half = _Z * math.sqrt(share * (1 - share) / total + squared / (4 * total)) / (1 + squared)
    return Proportion(
        count=count,
        total=total,
        value=share,
        low=max(0.0, centre - half),
        high=min(1.0, centre + half),
    )


def class_rows(records: Sequence[Record], labels: Sequence[str]) -> list[ClassRow]:
    """A row for each class that occurs, the least recall first."""
    rows = []
    for class_id in sorted({record.class_id for record in records}):
        own = [record for record in records if record.class_id == class_id]
        claimed = [record for record in records if record.predicted == class_id]
        rows.append(
            ClassRow(
                class_id=class_id,
                label=labels[class_id],
                images=len(own),
                recall=proportion(sum(record.correct for record in own), len(own)),
                precision=proportion(sum(record.correct for record in claimed), len(claimed)),
                confidence=float(np.mean([record.confidence for record in own])),
            )
        )
    return sorted(rows, key=lambda row: (row.recall.value, -row.images))


def confusions(records: Sequence[Record], labels: Sequence[str]) -> list[Confusion]:
    """Pairs of classes that were confused, the most frequent first."""
    pairs = Counter((r.class_id, r.predicted) for r in records if not r.correct)
    return [
        Confusion(true=labels[true], predicted=labels[predicted], count=count)
        for (true, predicted), count in pairs.most_common()
    ]


def calibration(records: Sequence[Record]) -> Calibration:
    """Compare confidence and accuracy over equal ranges of confidence."""
    bins, ece = [], 0.0
    for index in range(_BINS):
        low, high = index / _BINS, (index + 1) / _BINS
        inside = [
            r for r in records if low < r.confidence <= high or (index == 0 and r.confidence == 0)
        ]
        if not inside:
            continue
        confidence = float(np.mean([record.confidence for record in inside]))
        accuracy = float(np.mean([record.correct for record in inside]))
        ece += len(inside) / len(records) * abs(confidence - accuracy)
        bins.append(
            CalibrationBin(
                low=low, high=high, count=len(inside), confidence=confidence, accuracy=accuracy
            )
        )
    return Calibration(ece=ece, bins=tuple(bins))


def attribution(records: Sequence[Record]) -> Attribution:
    """Where the attribution lies on average."""
    shares = [share_inside(r.map, _frame(r.map)) for r in records]
    boxed = [r for r in records if r.box is not None]
    inside = [_box_mask(r) for r in boxed]
    return Attribution(
        border=_mean(shares),
        border_area=float(_frame(records[0].map).mean()),
        box=_mean([share_inside(r.map, m) for r, m in zip(boxed, inside, strict=True)])
        if boxed
        else None,
        box_area=_mean([float(mask.mean()) for mask in inside]) if boxed else None,
        box_cut=_mean([_cut(r) for r in boxed]) if boxed else None,
        unseen=_mean([_unseen(r) for r in records]),
    )


def share_inside(values: np.ndarray, mask: np.ndarray) -> float:
    """The share of a map (h, w) that lies in a mask of weights from 0 to 1; of nothing it is 0."""
    total = float(values.sum())
    return float((values * mask).sum()) / total if total > 0 else 0.0


def _frame(values: np.ndarray) -> np.ndarray:
    """How much of each cell of a map lies in the border of the input."""
    rows, columns = (_inner(side) for side in values.shape)
    return 1 - np.outer(rows, columns)


def _inner(cells: int) -> np.ndarray:
    return _overlap(cells, FRAME, 1 - FRAME)


def _overlap(cells: int, start: float, stop: float) -> np.ndarray:
    """How much of each of equal cells of [0, 1] lies between two points."""
    edges = np.linspace(0, 1, cells + 1)
    covered = np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)
    share: np.ndarray = np.maximum(covered, 0) * cells
    return share


def _box_mask(record: Record) -> np.ndarray:
    """How much of each cell of the map lies in the box."""
    left, top, width, height = record.region
    assert record.box is not None
    x, y, box_width, box_height = record.box
    rows, columns = record.map.shape
    return np.outer(
        _overlap(rows, (y - top) / height, (y + box_height - top) / height),
        _overlap(columns, (x - left) / width, (x + box_width - left) / width),
    )


def _cut(record: Record) -> float:
    """The share of the box that lies outside the crop."""
    assert record.box is not None
    area = record.box[2] * record.box[3]
    return 1 - _common_area(record.box, record.region) / max(area, 1e-9)


def _unseen(record: Record) -> float:
    width, height = record.size
    return 1 - _common_area((0, 0, width, height), record.region) / (width * height)


def _common_area(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
