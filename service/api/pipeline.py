"""Decode, run on a device, render: the whole of a request, without a word of HTTP.

Routes and the command line use it alike. Decoding and rendering run in a thread pool (Pillow, zlib
and numpy let go of the interpreter), all images of a request at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np

from models.errors import (
    DeadlineExceeded,
    HeatlensError,
    InternalError,
    ModelReplaced,
    NotReady,
    Overloaded,
)
from models.imaging.decode import DecodeLimits, decode
from models.imaging.preprocess import preprocess
from models.types import Job, ModelInfo, Struct
from service import logs, tracing
from service.api.plan import Plan, PlannedImage
from service.api.responses import View, render
from service.api.schemas import (
    ExplainResult,
    FeaturesResult,
    ImageError,
    PredictResult,
    Result,
    Timings,
)
from service.devices.messages import Completion, Submission
from service.devices.pool import DevicePool, is_long

T = TypeVar("T")

_log = logging.getLogger(__name__)

_RESULTS: dict[str, type[PredictResult | ExplainResult | FeaturesResult]] = {
    "predict": PredictResult,
    "explain": ExplainResult,
    "features": FeaturesResult,
}


class ImageTimings(Struct):
    """What one image took, milliseconds per stage, and the size of the batch it ran in, on which device."""

    decode: float
    queue: float
    device: float
    render: float
    batch_size: int
    where: str


class Reply(Struct):
    """What became of a plan.

    Attributes:
        results: one per image, in order.
        timings: of the request; each stage is its slowest image's.
        batch_size: the largest batch that one of its images ran in.
        device: where they ran, comma-separated.
        images: timings of each image that succeeded.
    """

    results: tuple[Result, ...]
    timings: Timings
    batch_size: int
    device: str
    images: tuple[ImageTimings, ...]


class Pipeline:
    """Runs plans.

    Args:
        pool: the devices.
        limits: caps on pictures.
        threads: where pictures are decoded and drawn.
        max_wait_s: estimated wait for a device beyond which nothing is decoded any more; devices
            refuse by themselves.
    """

    def __init__(
        self,
        pool: DevicePool,
        *,
        limits: DecodeLimits,
        threads: Executor,
        max_wait_s: float = math.inf,
    ) -> None:
        self._pool = pool
        self._limits = limits
        self._threads = threads
        self._max_wait_s = max_wait_s

    async def run(self, plan: Plan) -> Reply:
        """Run all images of a plan; cancelling this cancels their jobs.

        Raises:
            Overloaded: every device is busy for too long.
            DeadlineExceeded: the plan's deadline passed.
            ModelReplaced: the model was replaced meanwhile; a plan for the new one may succeed.
            HeatlensError: the first image's error, when every image failed.
        """
        self._refuse_excess(plan)
        try:
            async with asyncio.timeout(plan.deadline - time.monotonic()):
                ends = await asyncio.gather(*(self._end_of(image, plan) for image in plan.images))
        except TimeoutError:
            raise DeadlineExceeded("The deadline passed before the answer was ready.") from None
        for end in ends:
            if isinstance(
                end, ModelReplaced
            ):  # not this image's fault: none of them has its answer
                raise end
        return _reply(ends, plan)

    def _refuse_excess(self, plan: Plan) -> None:
        """Refuse what the devices would refuse, before it costs the time of decoding it.

        Long jobs have a share of the devices of their own, of whose queue only the devices know.
        """
        if any(is_long(image.options) for image in plan.images):
            return
        name = f"{plan.info.card.name}@{plan.info.card.version}"
        waits = [
            device.wait_ms / 1000
            for device in self._pool.devices()
            if device.state == "ready" and name in device.models
        ]
        excess_s = min(waits, default=0.0) - self._max_wait_s
        if excess_s > 0:
            raise Overloaded("The service is at its limit.", retry_after_s=excess_s)

    async def _end_of(
        self, image: PlannedImage, plan: Plan
    ) -> tuple[Result, ImageTimings] | HeatlensError:
        try:
            return await self._run_image(image, plan)
        except HeatlensError as error:
            return error
        except Exception:  # noqa: BLE001 - one image must not take its neighbours along
            _log.exception("An image failed unexpectedly.")
            return InternalError("Something went wrong in the service.")

    async def _run_image(self, image: PlannedImage, plan: Plan) -> tuple[Result, ImageTimings]:
        if image.input.error is not None:
            raise image.input.error
        decoding = time.monotonic()
        view, digest = await self._in_thread(lambda: self._prepare(image, plan))
        submitted = time.monotonic()
        tracing.stage("decode", began=decoding, ended=submitted)
        completion = await self._submit(image, view.input, digest, plan)
        answered = time.monotonic()
        result = await self._in_thread(lambda: render(completion.outcome, view, plan))
        rendered = time.monotonic()
        tracing.stage("render", began=answered, ended=rendered)
        return result, ImageTimings(
            decode=_ms(submitted - decoding),
            queue=round(completion.queue_ms, 3),
            device=round(completion.device_ms, 3),
            render=_ms(rendered - answered),
            batch_size=completion.batch_size,
            where=completion.device,
        )

    async def _submit(
        self, image: PlannedImage, model_input: np.ndarray, digest: str, plan: Plan
    ) -> Completion:
        card = plan.info.card
        return await self._pool.submit(
            Submission(
                job=Job(
                    id=uuid.uuid4().hex,
                    operation=plan.operation,
                    model=card.name,
                    version=card.version,
                    input=model_input,
                    options=image.options,
                ),
                deadline=plan.deadline,
                digest=digest,
                traceparent=tracing.traceparent(),
                request_id=logs.request_id.get(),
                fingerprint=card.fingerprint,
            )
        )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _prepare(self, image: PlannedImage, plan: Plan) -> tuple[View, str]:
        spec = plan.info.card.input
        if spec is None:
            raise NotReady("The model is not ready yet.", field="model")
        whole = plan.operation == "explain" and plan.render.canvas == "original"
        picture = decode(
            image.input.data, limits=self._limits, preprocess=spec, keep_original=whole
        )
        model_input, geometry = preprocess(picture, spec)
        view = View(
            input=model_input,
            geometry=geometry,
            picture=picture if whole else None,
            warnings=picture.warnings,
        )
        return view, digest_of(model_input, plan.info)


def digest_of(model_input: np.ndarray, info: ModelInfo) -> str:
    """Name an input by model and content, so that it is recognised after a worker's death."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{info.card.name}@{info.card.version}".encode())
    digest.update(np.ascontiguousarray(model_input).data)
    return digest.hexdigest()


def _reply(ends: Sequence[tuple[Result, ImageTimings] | HeatlensError], plan: Plan) -> Reply:
    done = [end[1] for end in ends if not isinstance(end, HeatlensError)]
    if not done:
        raise next(end for end in ends if isinstance(end, HeatlensError))
    failed = _RESULTS[plan.operation]
    results = tuple(
        failed(error=ImageError(code=end.code, error=end.message))
        if isinstance(end, HeatlensError)
        else end[0]
        for end in ends
    )
    timings = Timings(
        decode=max(image.decode for image in done),
        queue=max(image.queue for image in done),
        device=max(image.device for image in done),
        render=max(image.render for image in done),
        total=_ms(time.monotonic() - plan.started),
    )
    batch_size = max(image.batch_size for image in done)
    return Reply(
        results=results,
        timings=timings,
        batch_size=batch_size,
        device=",".join(sorted({image.where for image in done})),
        images=tuple(done),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
