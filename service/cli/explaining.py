"""Explains files through a client, writes the results, and skips files that are already done."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import heatlens
from models.types import Struct
from service.cli.files import ImageFile, write_result

if TYPE_CHECKING:
    from heatlens import AsyncClient

T = TypeVar("T")
OnFileProgress = Callable[[str, float], object]

_MIN_IN_FLIGHT = 4
_MAX_IN_FLIGHT = 32

# These say that no image can be explained this way.
_OF_THE_REQUEST = frozenset(
    {
        "forbidden",
        "invalid_option",
        "method_not_applicable",
        "target_out_of_range",
        "unauthorized",
        "unknown_label",
        "unknown_layer",
        "unknown_model",
    }
)


class Explained(Struct):
    """An explained image.

    Attributes:
        result: its entry of `results`, as in a response of the API.
        overlays: paths of the overlays.
        resumed: whether it had been explained before.
    """

    image: ImageFile
    result: dict[str, Any]
    overlays: tuple[Path, ...]
    resumed: bool = False

    def summary(self) -> dict[str, Any]:
        """The image, its predictions and its overlays, for a line of JSON."""
        return {
            "image": str(self.image.path),
            "predictions": self.result["predictions"],
            "overlays": [str(path) for path in self.overlays],
        }


class Failed(Struct):
    """An image that could not be explained.

    Attributes:
        code: an error code of the API, or `unreadable` for a file that cannot be read.
    """

    image: ImageFile
    code: str
    message: str

    def summary(self) -> dict[str, Any]:
        """The image and why it failed, for a line of JSON."""
        return {"image": str(self.image.path), "code": self.code, "error": self.message}


async def explain_files(
    client: AsyncClient,
    files: Sequence[ImageFile],
    *,
    options: Mapping[str, Any],
    folder: Path,
    on_progress: OnFileProgress,
) -> AsyncGenerator[Explained | Failed]:
    """Explain files and write the results; yields each as soon as it is done.

    Several files are in flight at once, so that batches form. A file whose result is in the folder
    already, by the same options, is not explained again. `on_progress` is called with the name of a
    file and how far it is, 0 to 1.

    Raises:
        APIError: no image can be explained, because of the options, the model or the key.
        ConnectionFailed: the service cannot be reached.
    """
    cards = [card for card in await client.models() if card.ready]
    best_batch = max((card.best_batch or 1 for card in cards), default=1)
    in_flight = min(max(2 * best_batch, _MIN_IN_FLIGHT), _MAX_IN_FLIGHT)
    runner = _Runner(client, {**options, "outputs": ["overlay"]}, folder, on_progress)
    work = (runner.explain(file) for file in files)
    async for report in as_completed(work, limit=in_flight):
        yield report


@dataclass(frozen=True, slots=True)
class _Runner:
    """Explains files by the same options."""

    client: AsyncClient
    options: Mapping[str, Any]
    folder: Path
    on_progress: OnFileProgress

    async def explain(self, file: ImageFile) -> Explained | Failed:
        """Explain one file and write its result."""
        try:
            if (done := await asyncio.to_thread(self._resume, file)) is not None:
                return done
            data = await asyncio.to_thread(file.path.read_bytes)
            response = await self.client.raw(
                "explain",
                data,
                on_progress=lambda news: self.on_progress(file.name, news.share),
                **self.options,
            )
            overlays = await asyncio.to_thread(
                write_result,
                response["results"][0],
                name=file.name,
                folder=self.folder,
                options=self.options,
            )
        except heatlens.APIError as error:
            if error.code in _OF_THE_REQUEST:
                raise
            return Failed(image=file, code=error.code, message=error.message)
        except OSError as error:
            return Failed(image=file, code="unreadable", message=error.strerror or "unreadable")
        result = response["results"][0]
        return Explained(image=file, result=result, overlays=tuple(overlays))

    def _resume(self, file: ImageFile) -> Explained | None:
        """The result of an earlier run, if it is of the same options and newer than the image."""
        written = self.folder / f"{file.name}.json"
        try:
            if written.stat().st_mtime < file.path.stat().st_mtime:
                return None
            result = json.loads(written.read_text(encoding="utf-8"))
            if result["options"] != json.loads(json.dumps(self.options)):
                return None
            overlays = [self.folder / item["overlay"]["file"] for item in result["explanations"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not all(path.is_file() for path in overlays):
            return None
        return Explained(image=file, result=result, overlays=tuple(overlays), resumed=True)


async def as_completed(work: Iterator[Coroutine[Any, Any, T]], *, limit: int) -> AsyncIterator[T]:
    """Run coroutines, at most `limit` at a time, and yield their results as they finish."""
    running: set[asyncio.Task[T]] = set()
    try:
        while True:
            started = itertools.islice(work, limit - len(running))
            running.update(asyncio.create_task(coroutine) for coroutine in started)
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
