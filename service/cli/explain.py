"""`heatlens explain` and `heatlens models`: the service's pipeline on a device of this process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from models.errors import HeatlensError, ModelLoadFailed, UnknownModel
from models.imaging.decode import DecodeLimits
from models.types import ModelInfo, Struct
from service.api.body import ImageInput
from service.api.options import ExplainOptions, validate
from service.api.pipeline import Pipeline
from service.api.plan import choose_model, job_options, make_plan
from service.cli.files import ImageFile, write_result
from service.devices.pool import DevicePool
from service.hardware import available_cores
from service.settings import LimitSettings, Settings
from service.worker.local import LocalPool

_TIMEOUT_S = 86_400.0
_MAX_WAIT_S = 3600.0
_MIN_IN_FLIGHT = 4
_MAX_IN_FLIGHT = 32


class Explained(Struct):
    """An explained image.

    Attributes:
        result: its entry of `results`, as in a response of the API.
        overlays: paths of the overlays.
    """

    image: ImageFile
    result: dict[str, Any]
    overlays: tuple[Path, ...]

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


async def load_models(settings: Settings) -> Sequence[ModelInfo]:
    """Load every configured model once; broken ones have a reason."""
    async with _local_pool(settings) as pool:
        return pool.models()


async def explain_files(
    files: Sequence[ImageFile],
    *,
    options: Mapping[str, Any],
    settings: Settings,
    folder: Path,
) -> AsyncIterator[Explained | Failed]:
    """Explain files and write the results; yields each as soon as it is done.

    Several files are in flight at once, so that batches form.

    Args:
        files: the images.
        options: options of `/v1/explain` by name.
        settings: limits, devices and models; only the model in use is loaded.
        folder: an existing folder for the results.

    Raises:
        HeatlensError: no image can be explained, because of the options or the model.
    """
    chosen = validate(ExplainOptions, {**options, "outputs": ["overlay"]})
    settings = _with_one_model(settings, chosen.model)
    async with _local_pool(settings) as pool:
        model = _choose_model(chosen.model, pool.models(), settings)
        # Options that do not fit the model fail here, once for all images.
        job_options(chosen, model)
        in_flight = min(max(2 * model.card.best_batch, _MIN_IN_FLIGHT), _MAX_IN_FLIGHT)
        with ThreadPoolExecutor(available_cores()) as threads:
            caps = DecodeLimits(
                max_bytes=settings.limits.max_image_bytes, max_pixels=settings.limits.max_pixels
            )
            pipeline = Pipeline(pool, limits=caps, threads=threads)
            runner = _Runner(pipeline, model, chosen, settings.limits)
            work = (runner.explain(file, folder) for file in files)
            async for report in _as_completed(work, limit=in_flight):
                yield report


@dataclass(frozen=True, slots=True)
class _Runner:
    """Runs files through a pipeline, with the same model and options for all."""

    pipeline: Pipeline
    model: ModelInfo
    options: ExplainOptions
    limits: LimitSettings

    async def explain(self, file: ImageFile, folder: Path) -> Explained | Failed:
        """Explain one file and write its result."""
        try:
            data = await asyncio.to_thread(self._read, file.path)
            now = time.monotonic()
            plan = make_plan(
                [ImageInput(data=data)],
                self.options,
                self.model,
                limits=self.limits,
                started=now,
                deadline=now + _TIMEOUT_S,
            )
            reply = await self.pipeline.run(plan)
            result = msgspec.to_builtins(reply.results[0])
            overlays = await asyncio.to_thread(write_result, result, name=file.name, folder=folder)
        except HeatlensError as error:
            return Failed(image=file, code=error.code, message=error.message)
        except OSError as error:
            return Failed(image=file, code="unreadable", message=error.strerror or "unreadable")
        return Explained(image=file, result=result, overlays=tuple(overlays))

    def _read(self, path: Path) -> bytes:
        """Read at most one byte more than is allowed, which the decoder then refuses."""
        with path.open("rb") as stream:
            return stream.read(self.limits.max_image_bytes + 1)


async def _as_completed(
    work: Iterator[Coroutine[Any, Any, Explained | Failed]], *, limit: int
) -> AsyncIterator[Explained | Failed]:
    """Run coroutines, at most `limit` at a time, and yield their results as they finish."""
    running: set[asyncio.Task[Explained | Failed]] = set()
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


@contextlib.asynccontextmanager
async def _local_pool(settings: Settings) -> AsyncIterator[DevicePool]:
    """A pool in which every configured model is ready or unavailable."""
    pool = LocalPool(settings)
    await pool.start()
    try:
        await pool.wait_loaded()
        yield pool
    finally:
        await pool.close()


def _with_one_model(settings: Settings, reference: str | None) -> Settings:
    """The same settings with only the requested model, and with time for long queues."""
    name, _, version = (reference or settings.default_model).partition("@")
    specs = [s for s in settings.models if s.name == name and version in {"", s.version}]
    if not specs:
        known = ", ".join(f"{spec.name}@{spec.version}" for spec in settings.models)
        raise UnknownModel(f"The model is not configured. Known are: {known}.", field="model")
    limits = settings.limits.model_copy(update={"max_wait_s": _MAX_WAIT_S})
    return settings.model_copy(update={"models": specs, "default_model": name, "limits": limits})


def _choose_model(
    reference: str | None, models: Sequence[ModelInfo], settings: Settings
) -> ModelInfo:
    """Choose as the API does, but say why a model is broken: there is no server to ask."""
    broken = [model.card for model in models if model.card.reason]
    if broken and not any(model.card.ready for model in models):
        cause = f" Cause: {broken[0].cause}" if broken[0].cause else ""
        raise ModelLoadFailed(
            f"The model could not be loaded: {broken[0].reason}{cause}", field="model"
        )
    return choose_model(reference, models, settings)
