"""Explains every image once, and keeps what the report needs in a file that survives interruption."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import heatlens
from models.types import Struct
from service.cli.explaining import as_completed
from service.cli.report.dataset import LabelledImage

if TYPE_CHECKING:
    from heatlens import AsyncClient

_IN_FLIGHT = 8
# The service cuts it to what it allows.
_PATIENCE_S = 3600.0


class Record(Struct):
    """What was found out about one image.

    Attributes:
        path: relative to the folder of the images.
        class_id: its class.
        predicted: the most probable class.
        confidence: its probability, 0 to 1.
        true_probability: probability of its class.
        values: the map of the predicted class, (h, w).
        region: (x, y, width, height) in pixels of the image that the model saw.
        size: (width, height) of the image.
        box: of the object, if known.
        faithfulness: (value, random) by measure, if it was measured.
        error: why the image could not be explained; all else is empty then.
    """

    path: str
    class_id: int
    predicted: int = -1
    confidence: float = 0.0
    true_probability: float = 0.0
    values: list[list[float]] = []
    region: tuple[float, float, float, float] = (0, 0, 0, 0)
    size: tuple[int, int] = (0, 0)
    box: tuple[float, float, float, float] | None = None
    faithfulness: dict[str, tuple[float, float]] = {}
    error: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the most probable class is the image's."""
        return self.predicted == self.class_id

    @property
    def map(self) -> np.ndarray:
        """What speaks for the predicted class, float32 (h, w)."""
        return np.maximum(np.asarray(self.values, np.float32), 0)


class RecordFile:
    """Records on disk, one JSON line each; the first line says what they were made with."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        """Open a file; records that were made with another setting are dropped."""
        self._path = path
        self._header = json.dumps(setting, sort_keys=True)
        self.records: dict[str, Record] = {}
        if not self._read():
            path.write_text(self._header + "\n", encoding="utf-8")

    def add(self, record: Record) -> None:
        """Append a record."""
        self.records[record.path] = record
        with self._path.open("ab") as stream:
            stream.write(msgspec.json.encode(record) + b"\n")

    def _read(self) -> bool:
        if not self._path.is_file():
            return False
        text = self._path.read_text(encoding="utf-8")
        header, *lines = text.split("\n")
        if header != self._header:
            return False
        if not text.endswith("\n"):
            # An interruption cut the last line; the next record needs one of its own.
            with self._path.open("a") as stream:
                stream.write("\n")
        for line in lines:
            try:
                record = msgspec.json.decode(line, type=Record)
            except msgspec.DecodeError:
                continue
            if record.error is None:
                self.records[record.path] = record
        return True


async def collect(
    client: AsyncClient,
    images: Sequence[LabelledImage],
    file: RecordFile,
    *,
    folder: Path,
    options: dict[str, Any],
    measured: int,
) -> AsyncGenerator[Record]:
    """Explain those images that the file does not hold yet; yields each record as it is made.

    Args:
        client: of the service.
        images: of the data set.
        file: takes the records.
        folder: that the paths of the records start from.
        options: of every request: model, method, layer.
        measured: number of images, spread over the data set, whose faithfulness is measured.
    """
    stride = max(1, len(images) // measured) if measured else 0

    async def explain(index: int, image: LabelledImage) -> Record:
        wanted = bool(stride) and index % stride == 0
        extra: dict[str, Any] = {"faithfulness": ["deletion", "insertion"]} if wanted else {}
        return await _explain(
            client, image, str(image.path.relative_to(folder)), {**options, **extra}
        )

    todo = (
        explain(index, image)
        for index, image in enumerate(images)
        if str(image.path.relative_to(folder)) not in file.records
    )
    async for record in as_completed(todo, limit=_IN_FLIGHT):
        file.add(record)
        yield record


async def _explain(
    client: AsyncClient, image: LabelledImage, path: str, options: dict[str, Any]
) -> Record:
    try:
        data = await asyncio.to_thread(image.path.read_bytes)
        response = await client.explain(
            data,
            targets=["top1", image.class_id],
            outputs=["values"],
            statistics=False,
            timeout_s=_PATIENCE_S,
            **options,
        )
    except heatlens.APIError as error:
        if error.field is not None:
            raise
        return Record(path=path, class_id=image.class_id, error=f"{error.code}: {error.message}")
    except OSError as error:
        return Record(path=path, class_id=image.class_id, error=error.strerror or "unreadable")
    predicted, true = response.explanations
    seen = response.result.image
    assert seen is not None
    assert predicted.values is not None
    region = seen.region
    return Record(
        path=path,
        class_id=image.class_id,
        predicted=predicted.target.class_id,
        confidence=predicted.target.probability,
        true_probability=true.target.probability,
        values=[[round(float(v), 6) for v in row] for row in predicted.values],
        region=(region.x, region.y, region.width, region.height),
        size=(seen.width, seen.height),
        box=image.box,
        faithfulness={
            name: (measure.value, measure.random)
            for name, measure in predicted.faithfulness.items()
            if measure.value is not None and measure.random is not None
        },
    )
