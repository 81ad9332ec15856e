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
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from msgspec import structs

from models.errors import (
    DeadlineExceeded,
    HeatlensError,
    InvalidOption,
    ModelReplaced,
    Overloaded,
)
from models.imaging.decode import DecodeLimits
from models.imaging.prepare import PreparedImage
from models.types import Job, Operation, Struct
from service import logs, tracing
from service.api import schemas
from service.api.decoders import Decoders
from service.api.errors import internal_error
from service.api.host import HostWork
from service.api.label_sets import LabelSets
from service.api.line import Line
from service.api.pair import Pair
from service.api.plan import Plan, PlannedImage
from service.api.preparation import PlanInputs, Preparation
from service.api.responses import draw, render
from service.api.schemas import STAGES, ExplanationResponse, ImageError, Result, Timings
from service.api.watch import PartialMap, Watch
from service.devices.messages import JobProgress, News, Submission
from service.devices.pool import DevicePool

_DRAW_S = 0.05
# Answers of the largest size that may be in the making at once.
_ANSWERS = 3
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
        limits: caps on images.
        threads: where images are decoded and drawn.
        workers: the number of these threads.
        decoders: where images are decoded that are not proved to be cheap; None = in threads, too.
        max_pixels: of all images of a plan together.
        max_wait_s: estimated wait beyond which a plan is refused before decoding.
        max_answer_bytes: estimated size of one answer; all that are being made together have at
            most three times as much.
    """

    def __init__(
        self,
        pool: DevicePool,
        *,
        limits: DecodeLimits,
        threads: Executor,
        workers: int = 2,
        decoders: Decoders | None = None,
        max_pixels: float = math.inf,
        max_wait_s: float = math.inf,
        max_answer_bytes: int = 32_000_000,
    ) -> None:
        self._pool = pool
        self._preparation = Preparation(
            limits, threads=threads, decoders=decoders, max_pixels=max_pixels
        )
        self._host = HostWork(threads, workers=workers)
        self._line = Line(max_wait_s=max_wait_s)
        self._max_wait_s = max_wait_s
        self._max_answer_bytes = max_answer_bytes
        self._answer_bytes = 0
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
        self._refuse_excess(plan)
        if watch is not None:
            # A comparison is one job.
            watch.start(1 if plan.operation == "compare" else len(plan.images))
        room = _Room(_TOLERANCE * self._max_answer_bytes)
        pair = Pair(plan.info) if plan.operation == "compare" else None
        # A long job has its own share of a device, for which it waits there.
        place = nullcontext() if plan.is_long else self._line.place(plan.device_ms)
        self._answer_bytes += plan.answer_bytes
        try:
            with place:
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
        finally:
            self._answer_bytes -= plan.answer_bytes
        return reply if pair is None else structs.replace(reply, similarity=pair.similarity)

    def refuse_unread(self, *, may_be_long: bool) -> None:
        """Refuse a request at the limit before its body is read.

        Args:
            may_be_long: whether its body may ask for a long job, which has its own share of a device.

        Raises:
            Overloaded: whatever it is, it would wait for too long.
        """
        wait_s = self._line.wait_s
        if may_be_long:
            ready = (device for device in self._pool.devices() if device.state == "ready")
            longs = (device.long_wait_ms / 1000 for device in ready)
            wait_s = min(wait_s, min(longs, default=0.0))
        self._line.admit(wait_s, patience_s=self._max_wait_s)

    def _refuse_excess(self, plan: Plan) -> None:
        """Refuse a plan before spending time on decoding it, if it would wait for too long.

        Raises:
            Overloaded: for a device, for the threads, or for memory.
        """
        others = self._answer_bytes
        if others and others + plan.answer_bytes > _ANSWERS * self._max_answer_bytes:
            raise Overloaded("Too many large answers are being made.", retry_after_s=1.0)
        name = plan.info.card.full_name
        waits = [
            (device.long_wait_ms if plan.is_long else device.wait_ms) / 1000
            for device in self._pool.devices()
            if device.state == "ready" and name in device.models
        ]
        here_s = self._host.wait_s if plan.is_long else max(self._host.wait_s, self._line.wait_s)
        patience_s = min(plan.patience_s(self._max_wait_s), plan.deadline - time.monotonic())
        self._line.admit(max(min(waits, default=0.0), here_s), patience_s=max(0.0, patience_s))

    async def draw(self, item: PartialMap) -> ExplanationResponse:
        """Draw what a map shows so far."""
        with self._host.stage("draw") as stage:
            return await stage.run(lambda: draw(item.explanation, item.source, item.plan))

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
        with self._host.stage("decode") as stage:
            prepared = await inputs.prepare(number, stage)
        submitted = time.monotonic()
        tracing.stage("decode", began=decoding, ended=submitted)

        def hear(news: JobProgress) -> None:
            if watch is not None:
                watch.hear(number, news, prepared, plan)

        submission = _submission(image, prepared, plan, is_watched=watch is not None)
        submit = partial(self._pool.submit, on_progress=hear)
        with self._host.stage("draw") as stage:
            if pair is None:
                completion = await submit(submission)
            else:
                completion = await pair.run(number, submission, submit)
            answered = time.monotonic()
            steps = render(completion.outcome, prepared, plan)
            result, piece = None, number
            while result is None:
                result = await stage.run(lambda: _draw_some(steps, room), piece=piece)
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
