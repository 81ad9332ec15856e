"""The service's pipeline without the service: files in, files out, with the device in this process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from models.errors import HeatlensError, ModelLoadFailed, UnknownModel, WorkerLost
from models.imaging.decode import DecodeLimits
from models.types import ModelInfo, Struct
from service.api.body import ImageInput
from service.api.options import ExplainOptions, validate
from service.api.pipeline import Pipeline
from service.api.plan import choose_model, job_options, make_plan
from service.cli.files import ImageFile, write_result
from service.devices.pool import DevicePool
from service.hardware import available_cores
from service.settings import Settings

MakePool = Callable[[Settings], DevicePool]

_PATIENCE_S = 86_400.0
_POLL_S = 0.02
_MIN_IN_FLIGHT = 4
_MAX_IN_FLIGHT = 32


class Explained(Struct):
    """A picture that was explained.

    Attributes:
        result: its entry of `results` as the API answers it.
        overlays: the overlays written.
    """

    picture: ImageFile
    result: dict[str, Any]
    overlays: tuple[Path, ...]

    def summary(self) -> dict[str, Any]:
        """The picture, its predictions and its files, for a line of JSON."""
        return {
            "picture": str(self.picture.path),
            "predictions": self.result["predictions"],
            "overlays": [str(path) for path in self.overlays],
        }


class Failed(Struct):
    """A picture that was not; `code` is one of the API's, or `unreadable` for a file that cannot be opened."""

    picture: ImageFile
    code: str
    message: str


def local_pool(settings: Settings) -> DevicePool:
    """A pool whose device is in this process."""
    from service.worker.local import LocalPool

    return LocalPool(settings)


async def load_models(
    settings: Settings, *, make_pool: MakePool = local_pool
) -> Sequence[ModelInfo]:
    """Load every configured model once and say what was found, the broken ones with their reason."""
    async with _running(make_pool(settings)) as pool:
        return await _all_models(pool, settings)


async def explain_files(
    files: Sequence[ImageFile],
    *,
    options: Mapping[str, Any],
    settings: Settings,
    folder: Path,
    make_pool: MakePool = local_pool,
) -> AsyncIterator[Explained | Failed]:
    """Explain files and write the results, several at once so that batches form; yields as they end.

    Args:
        files: the pictures.
        options: those of `/v1/explain`, by name.
        settings: caps, devices and models; only the model that answers is loaded.
        folder: an existing folder for the results.
        make_pool: makes the devices.

    Raises:
        HeatlensError: the options are wrong, or the model cannot be used: no picture could be
            explained.
    """
    chosen = validate(ExplainOptions, {**options, "outputs": ["overlay"]})
    settings = _for_one_model(settings, chosen.model)
    async with _running(make_pool(settings)) as pool:
        infos = await _all_models(pool, settings)
        info = _usable(chosen.model, infos, settings)
        job_options(chosen, info)  # what is wrong with the options is wrong for every picture
        with ThreadPoolExecutor(available_cores()) as threads:
            desk = _Desk(pool, info=info, options=chosen, settings=settings, threads=threads)
            in_flight = min(max(2 * info.card.best_batch, _MIN_IN_FLIGHT), _MAX_IN_FLIGHT)
            async for report in _concurrently(
                lambda file: desk.explain(file, folder), files, in_flight
            ):
                yield report


class _Desk:
    """What explaining one file takes."""

    def __init__(
        self,
        pool: DevicePool,
        *,
        info: ModelInfo,
        options: ExplainOptions,
        settings: Settings,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._info = info
        self._options = options
        self._limits = settings.limits
        caps = DecodeLimits(
            max_bytes=settings.limits.max_image_bytes, max_pixels=settings.limits.max_pixels
        )
        self._pipeline = Pipeline(pool, limits=caps, threads=threads)

    async def explain(self, file: ImageFile, folder: Path) -> Explained | Failed:
        try:
            data = await asyncio.to_thread(self._read, file.path)
            now = time.monotonic()
            plan = make_plan(
                [ImageInput(data=data)],
                self._options,
                self._info,
                limits=self._limits,
                started=now,
                deadline=now + _PATIENCE_S,
            )
            reply = await self._pipeline.run(plan)
            result = msgspec.to_builtins(reply.results[0])
            overlays = await asyncio.to_thread(
                lambda: write_result(result, name=file.name, folder=folder)
            )
        except HeatlensError as error:
            return Failed(picture=file, code=error.code, message=error.message)
        except OSError as error:
            return Failed(picture=file, code="unreadable", message=error.strerror or "unreadable")
        return Explained(picture=file, result=result, overlays=tuple(overlays))

    def _read(self, path: Path) -> bytes:
        """At most one byte more than is allowed; the decoder then says that it is too large."""
        with path.open("rb") as stream:
            return stream.read(self._limits.max_image_bytes + 1)


async def _concurrently(
    work: Callable[[ImageFile], Any], files: Sequence[ImageFile], limit: int
) -> AsyncIterator[Explained | Failed]:
    waiting = iter(files)
    running: set[asyncio.Task[Explained | Failed]] = set()
    try:
        while True:
            while len(running) < limit and (file := next(waiting, None)) is not None:
                running.add(asyncio.create_task(work(file)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()


@contextlib.asynccontextmanager
async def _running(pool: DevicePool) -> AsyncIterator[DevicePool]:
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def _all_models(pool: DevicePool, settings: Settings) -> Sequence[ModelInfo]:
    """Wait until every configured model is ready or known to be broken."""
    wanted = {(spec.name, spec.version) for spec in settings.models}
    while True:
        infos = pool.models()
        settled = {
            (info.card.name, info.card.version)
            for info in infos
            if info.card.state in {"ready", "unavailable"}
        }
        if wanted <= settled:
            return infos
        if any(device.state == "lost" for device in pool.devices()):
            raise WorkerLost("The device was lost while the models were loaded.")
        await asyncio.sleep(_POLL_S)


def _for_one_model(settings: Settings, reference: str | None) -> Settings:
    """The same settings with only the model that is asked for, and with patience for long queues."""
    name, _, version = (reference or settings.default_model).partition("@")
    specs = [
        spec
        for spec in settings.models
        if spec.name == name and (not version or spec.version == version)
    ]
    if not specs:
        known = ", ".join(f"{spec.name}@{spec.version}" for spec in settings.models)
        raise UnknownModel(f"There is no such model. Configured: {known}.", field="model")
    limits = settings.limits.model_copy(update={"max_wait_s": 3600.0})
    return settings.model_copy(update={"models": specs, "default_model": name, "limits": limits})


def _usable(reference: str | None, infos: Sequence[ModelInfo], settings: Settings) -> ModelInfo:
    """The model that answers; when it is broken the error says why, for nobody can ask the API."""
    broken = [info.card for info in infos if info.card.reason]
    if broken and not any(info.card.ready for info in infos):
        cause = f" Cause: {broken[0].cause}" if broken[0].cause else ""
        raise ModelLoadFailed(
            f"The model could not be loaded: {broken[0].reason}{cause}", field="model"
        )
    return choose_model(reference, infos, settings)
