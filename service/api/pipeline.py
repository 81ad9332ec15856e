"""Decode, run on a device, render: the work of a request, independent of HTTP.

Used by the routes and by the command line. Decoding and rendering run in a thread pool (Pillow,
zlib and numpy release the interpreter), all images of a request at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from msgspec import structs

from models.errors import (
    DeadlineExceeded,
    HeatlensError,
    InvalidOption,
    ModelReplaced,
)
from models.imaging.decode import DecodeLimits
from models.imaging.prepare import PreparedImage
from models.types import Job, Operation, Struct
from service import logs, tracing
from service.api import schemas
from service.api.admission import Admission
from service.api.budget import LabelSets
from service.api.decoders import Decoders
from service.api.errors import internal_error
from service.api.host import HostWork
from service.api.pair import Pair
from service.api.plan import Plan, PlannedImage
from service.api.preparation import PlanInputs, Preparation
from service.api.responses import draw, render
from service.api.schemas import STAGES, ExplanationResponse, ImageError, Result, Timings
from service.api.watch import PartialMap, Watch
from service.devices.messages import JobProgress, News, Submission
from service.devices.pool import DevicePool

_DRAW_S = 0.05
# The estimate of an answer's size may be this far off.
_TOLERANCE = 2

T = TypeVar("T")

_log = logging.getLogger(__name__)

_RESULTS: Mapping[Operation, type[Result]] = {
    "predict": schemas.PredictResult,
    "explain": schemas.ExplainResult,
    "features": schemas.FeaturesResult,
    "compare": schemas.CompareResult,
}


class ImageRun(Struct):
    """The run of one image: timings, batch size and device."""

    timings: Timings
    batch_size: int
    device: str


class Reply(Struct):
    """The results of a plan, one per image in order.

    Attributes:
        timings: of the request; each stage is that of its slowest image.
        batch_size: the largest batch of its images.
        device: the devices of its images, comma-separated.
        runs: one for each image that succeeded.
        similarity: of two images that are compared.
    """

    results: tuple[Result, ...]
    timings: Timings
    batch_size: int
    device: str
    runs: tuple[ImageRun, ...]
    similarity: float = math.nan


class Pipeline:
    """Runs plans.

    Args:
        pool: the devices.
        admission: refuses plans before decoding.
        limits: caps on images.
        threads: where images are decoded and drawn.
        decoders: where images are decoded that are not proved to be cheap; None = in threads, too.
        max_pixels: of all images of a plan together.
    """

    def __init__(
        self,
        pool: DevicePool,
        *,
        admission: Admission,
        limits: DecodeLimits,
        threads: Executor,
        decoders: Decoders | None = None,
        max_pixels: float = math.inf,
    ) -> None:
        self._pool = pool
        self._host = HostWork(threads)
        self._preparation = Preparation(
            limits, host=self._host, decoders=decoders, max_pixels=max_pixels
        )
        self._admission = admission
        self.label_sets = LabelSets()

    async def run(self, plan: Plan, *, watch: Watch | None = None) -> Reply:
        """Run all images of a plan; cancelling this cancels their jobs.

        Args:
            plan: what to run.
            watch: hears how far the jobs have come.

        Raises:
            Overloaded: every device is busy for too long.
            DeadlineExceeded: the plan's deadline passed.
            ModelReplaced: the model was replaced meanwhile; a plan for the new one may succeed.
            HeatlensError: every image failed; this is the first one's error.
        """
        room = _Room(_TOLERANCE * self._admission.max_answer_bytes)
        pair = Pair(plan.info) if plan.operation == "compare" else None
        try:
            with self._admission.place(plan):
                if watch is not None:
                    # A comparison is one job.
                    watch.start(1 if plan.operation == "compare" else len(plan.images))
                async with asyncio.timeout(plan.deadline - time.monotonic()):
                    inputs = await self._preparation.begin(plan)
                    outcomes = await _together(
                        [
                            self._try_image(i, plan, inputs, watch=watch, room=room, pair=pair)
                            for i in range(len(plan.images))
                        ]
                    )
                reply = _reply(outcomes, plan)
            if plan.info.card.texts is not None:
                self.label_sets.add(plan.info)
        except TimeoutError:
            raise DeadlineExceeded("The deadline passed before the response was ready.") from None
        return reply if pair is None else structs.replace(reply, similarity=pair.similarity)

    async def draw(self, item: PartialMap) -> ExplanationResponse:
        """Draw what a map shows so far."""
        return await self._host.draw(lambda: draw(item.explanation, item.source, item.plan))

    async def _try_image(
        self,
        number: int,
        plan: Plan,
        inputs: PlanInputs,
        *,
        watch: Watch | None,
        room: _Room,
        pair: Pair | None,
    ) -> tuple[Result, ImageRun] | HeatlensError:
        failed: HeatlensError
        try:
            return await self._run_image(number, plan, inputs, watch=watch, room=room, pair=pair)
        except HeatlensError as error:
            failed = error
        except Exception:  # noqa: BLE001 # one image must not fail the others
            _log.exception("An image failed unexpectedly.")
            failed = internal_error()
        finally:
            if watch is not None and (pair is None or number == 0):
                watch.finish(number)
        if pair is not None:
            pair.fail(failed)
        return failed

    async def _run_image(
        self,
        number: int,
        plan: Plan,
        inputs: PlanInputs,
        *,
        watch: Watch | None,
        room: _Room,
        pair: Pair | None,
    ) -> tuple[Result, ImageRun]:
        image = plan.images[number]
        if image.input.error is not None:
            raise image.input.error
        decoding = time.monotonic()
        prepared = await inputs.prepare(number)
        submitted = time.monotonic()
        tracing.stage("decode", began=decoding, ended=submitted)

        def hear(news: JobProgress) -> None:
            if watch is not None:
                watch.hear(number, news, prepared, plan)

        submission = _submission(image, prepared, plan, is_watched=watch is not None)
        submit = partial(self._pool.submit, on_progress=hear)
        if pair is None:
            completion = await submit(submission)
        else:
            completion = await pair.run(number, submission, submit)
        answered = time.monotonic()
        steps = render(completion.outcome, prepared, plan)
        result, piece = None, number
        while result is None:
            result = await self._host.draw(lambda: _draw_some(steps, room), piece=piece)
            piece += 1
        rendered = time.monotonic()
        tracing.stage("render", began=answered, ended=rendered)
        timings = Timings(
            decode=_ms(submitted - decoding),
            queue=round(completion.queue_ms, 3),
            device=round(completion.device_ms, 3),
            render=_ms(rendered - answered),
            total=_ms(rendered - decoding),
        )
        run = ImageRun(timings=timings, batch_size=completion.batch_size, device=completion.device)
        return result, run


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> Sequence[T]:
    """Await all; one needs no task of its own."""
    return [await work[0]] if len(work) == 1 else await asyncio.gather(*work)


@dataclass(slots=True)
class _Room:
    """Bytes that the pictures of one answer may still take."""

    left: float

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            reason = (
                "The pictures are larger than an answer may be: ask for fewer, or smaller ones."
            )
            raise InvalidOption(reason, field="outputs")


def _draw_some(steps: Generator[int, None, Result], room: _Room) -> Result | None:
    """Draw for a short while; returns the result when it is complete."""
    until = time.monotonic() + _DRAW_S
    while True:
        try:
            room.take(next(steps))
        except StopIteration as stop:
            result: Result = stop.value
            return result
        if time.monotonic() >= until:
            return None


def _submission(
    image: PlannedImage, prepared: PreparedImage, plan: Plan, *, is_watched: bool
) -> Submission:
    card = plan.info.card
    news: News = "maps" if plan.render.partial_maps else "progress"
    return Submission(
        job=Job(
            id=uuid.uuid4().hex,
            operation=plan.operation,
            model=card.name,
            version=card.version,
            input=prepared.input,
            options=image.options,
            areas=prepared.areas,
        ),
        deadline=plan.deadline,
        price=image.price,
        traceparent=tracing.traceparent(),
        request_id=logs.request_id.get(),
        fingerprint=plan.info.fingerprint,
        news=news if is_watched else "none",
    )


def _reply(outcomes: Sequence[tuple[Result, ImageRun] | HeatlensError], plan: Plan) -> Reply:
    errors = [outcome for outcome in outcomes if isinstance(outcome, HeatlensError)]
    for error in errors:
        # The plan must be made again for all images, not only for this one.
        if isinstance(error, ModelReplaced):
            raise error
    runs = [outcome[1] for outcome in outcomes if not isinstance(outcome, HeatlensError)]
    if not runs:
        raise errors[0]
    failed = _RESULTS[plan.operation]
    results = tuple(
        failed(error=ImageError(code=item.code, error=item.message))
        if isinstance(item, HeatlensError)
        else item[0]
        for item in outcomes
    )
    slowest = {stage: max(getattr(run.timings, stage) for run in runs) for stage in STAGES}
    return Reply(
        results=results,
        timings=Timings(**slowest, total=_ms(time.monotonic() - plan.started)),
        batch_size=max(run.batch_size for run in runs),
        device=",".join(sorted({run.device for run in runs})),
        runs=tuple(runs),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
