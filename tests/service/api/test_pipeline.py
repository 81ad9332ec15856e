"""The pipeline without HTTP: concurrency, failures, deadlines."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image

from models.errors import (
    DeadlineExceeded,
    ImageTooLarge,
    ImageTooSmall,
    ImageUndecodable,
    InvalidOption,
    Overloaded,
)
from models.imaging.decode import DecodeLimits
from models.shares import LONG_SHARE
from models.types import Job, Outcome
from service.api.admission import Admission
from service.api.body import ImageInput
from service.api.options import ExplainOptions, FeaturesOptions, PredictOptions
from service.api.pipeline import Pipeline
from service.api.plan import Plan, make_plan
from service.api.schemas import ExplainResult, FeaturesResult, PredictResult
from service.devices.pool import DeviceStatus
from service.settings import LimitSettings
from tests.fakes import FakePool, fake_info
from tests.waiting import eventually

pytestmark = pytest.mark.anyio


def draw(seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def plan_of(
    *images: ImageInput, options: Any = None, seconds: float = 10, info: Any = None
) -> Plan:
    now = time.monotonic()
    return make_plan(
        images,
        options or PredictOptions(),
        info or fake_info(),
        limits=LimitSettings(),
        started=now,
        deadline=now + seconds,
    )


@asynccontextmanager
async def pipeline(pool: FakePool, **options: Any) -> AsyncIterator[Pipeline]:
    await pool.start()
    admission = Admission(pool, **options)
    with ThreadPoolExecutor(2) as threads:
        yield Pipeline(pool, admission=admission, limits=DecodeLimits(), threads=threads)


def waiting(*waits_s: float, models: tuple[str, ...] | None = None) -> list[DeviceStatus]:
    name = f"{fake_info().card.name}@{fake_info().card.version}"
    return [
        DeviceStatus(
            device=f"cpu:{n}",
            state="ready",
            wait_ms=1000 * wait_s,
            models=(name,) if models is None else models,
        )
        for n, wait_s in enumerate(waits_s)
    ]


async def test_excess_is_refused_before_it_is_decoded() -> None:
    pool = FakePool()
    async with pipeline(pool, max_wait_s=2.0) as made:
        pool.statuses = waiting(5.0, 3.5)
        with pytest.raises(Overloaded) as caught:
            await made.run(plan_of(ImageInput(data=b"not an image")))
        assert caught.value.retry_after_s == pytest.approx(1.5)
        assert not pool.submitted
        pool.statuses = waiting(5.0, 1.9)
        await made.run(plan_of(ImageInput(data=draw())))
        pool.statuses = waiting(5.0, models=("other@1",))  # says nothing of this model's devices
        await made.run(plan_of(ImageInput(data=draw())))


async def test_long_jobs_wait_for_their_share_of_a_device() -> None:
    """And twice as long as they take themselves, where that is longer than others may wait."""
    pool = FakePool()
    options = ExplainOptions(methods=["rise"])
    plan = plan_of(ImageInput(data=draw()), options=options, seconds=1000)
    own_ms = 2 * plan.device_ms / LONG_SHARE
    assert own_ms > 2000

    def wait_for(long_wait_ms: float) -> None:
        ready = waiting(0.0)
        pool.statuses = [structs.replace(s, wait_ms=0, long_wait_ms=long_wait_ms) for s in ready]

    async with pipeline(pool, max_wait_s=2.0) as made:
        pool.statuses = waiting(5.0)
        await made.run(plan)
        wait_for(own_ms - 10)
        await made.run(plan)
        wait_for(own_ms + 3000)
        with pytest.raises(Overloaded) as caught:
            await made.run(plan)
    assert caught.value.retry_after_s == pytest.approx(3.0)


async def test_what_would_wait_beyond_its_deadline_is_refused_before_it_is_decoded() -> None:
    pool = FakePool()
    async with pipeline(pool, max_wait_s=20.0) as made:
        pool.statuses = waiting(5.0)
        with pytest.raises(Overloaded):
            await made.run(plan_of(ImageInput(data=b"not an image"), seconds=4))
        await made.run(plan_of(ImageInput(data=draw()), seconds=6))


async def test_large_answers_are_made_a_few_at_a_time() -> None:
    pool = FakePool(delay_s=30)
    async with pipeline(pool, max_answer_bytes=50_000) as made:
        options = ExplainOptions(canvas="original", overlay_format="png", outputs=["overlay"])
        first = asyncio.create_task(made.run(plan_of(ImageInput(data=draw()), options=options)))
        await pool.arrived.wait()
        with pytest.raises(Overloaded, match="large answers"):
            await made.run(plan_of(ImageInput(data=draw())))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        pool.delay_s = 0
        assert await made.run(plan_of(ImageInput(data=draw())))


async def test_pictures_that_turn_out_too_large_end_the_request() -> None:
    async with pipeline(FakePool(), max_answer_bytes=500) as made:
        with pytest.raises(InvalidOption) as caught:
            await made.run(plan_of(ImageInput(data=draw()), options=ExplainOptions()))
    assert caught.value.field == "outputs"


async def test_drawing_ends_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, begun = [], asyncio.Event()
    loop = asyncio.get_running_loop()

    def locate(*_: Any, **__: Any) -> None:
        drawn.append(1)
        loop.call_soon_threadsafe(begun.set)

    monkeypatch.setattr("service.api.pipeline._DRAW_S", 0.0)
    monkeypatch.setattr("service.api.responses.locate", locate)
    options = ExplainOptions(targets=list(range(5)), layers=["*"], outputs=["values"])
    async with pipeline(FakePool()) as made:
        running = asyncio.create_task(made.run(plan_of(ImageInput(data=draw()), options=options)))
        await begun.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    # The context waited for the threads: at most the picture that had begun was finished.
    assert len(drawn) < 5


async def test_images_are_submitted_together() -> None:
    pool = FakePool(delay_s=0.2)
    images = [ImageInput(data=draw(i)) for i in range(10)]
    async with pipeline(pool) as made:
        started = time.monotonic()
        reply = await made.run(plan_of(*images))
    assert time.monotonic() - started < 1.5
    assert len(reply.results) == len(reply.runs) == 10


@pytest.mark.parametrize(
    ("options", "result"),
    [
        (PredictOptions(), PredictResult),
        (ExplainOptions(), ExplainResult),
        (FeaturesOptions(), FeaturesResult),
    ],
)
async def test_result_types(options: Any, result: type) -> None:
    images = [ImageInput(data=draw()), ImageInput(error=ImageUndecodable("Bad."))]
    async with pipeline(FakePool()) as made:
        reply = await made.run(plan_of(*images, options=options))
    assert [type(item) for item in reply.results] == [result, result]
    assert reply.results[1].error.code == "image_undecodable"


async def test_timings_are_the_slowest_images() -> None:
    class Slow(FakePool):
        async def submit(self, job: Job, **rest: Any) -> Outcome:
            n = len(self.submitted) + 1
            outcome = await super().submit(job, **rest)
            return structs.replace(
                outcome, queue_ms=n, device_ms=10 - n, batch_size=n, device=f"cpu:{n % 2}"
            )

    images = [ImageInput(data=draw(i)) for i in range(3)]
    async with pipeline(Slow()) as made:
        reply = await made.run(plan_of(*images))
    assert (reply.timings.queue, reply.timings.device, reply.batch_size) == (3, 9, 3)
    assert sorted(run.batch_size for run in reply.runs) == [1, 2, 3]
    assert reply.device == "cpu:0,cpu:1"
    assert reply.timings.total >= reply.timings.decode > 0


async def test_the_first_error_speaks_when_all_fail() -> None:
    pool = FakePool(fault=lambda _: Overloaded("Later.", retry_after_s=4))
    images = [ImageInput(data=draw()), ImageInput(error=ImageUndecodable("Bad."))]
    async with pipeline(pool) as made:
        with pytest.raises(Overloaded) as caught:
            await made.run(plan_of(*images))
    assert caught.value.retry_after_s == 4


@pytest.mark.parametrize("seconds", [0.1, 0.0, -5.0])
async def test_deadline(seconds: float) -> None:
    pool = FakePool(delay_s=30)
    async with pipeline(pool) as made:
        with pytest.raises(DeadlineExceeded):
            await made.run(plan_of(ImageInput(data=draw()), seconds=seconds))
    assert len(pool.cancelled) == len(pool.submitted)


async def test_cancelling_cancels_every_job() -> None:
    pool = FakePool(delay_s=30)
    images = [ImageInput(data=draw(i)) for i in range(4)]
    async with pipeline(pool) as made:
        running = asyncio.create_task(made.run(plan_of(*images)))
        await eventually(lambda: len(pool.submitted) == 4)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert sorted(pool.cancelled) == sorted(job.id for job in pool.submitted)


async def test_a_fault_of_one_image_stays_its_own(caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    def second(_: Job) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError("secret")

    images = [ImageInput(data=draw(i)) for i in range(3)]
    async with pipeline(FakePool(fault=second)) as made:
        reply = await made.run(plan_of(*images))
    errors = [item.error for item in reply.results if item.error]
    assert [error.code for error in errors] == ["internal"]
    assert "secret" not in errors[0].error
    assert "secret" in caplog.text


async def test_predictions_ignore_targets_of_an_image() -> None:
    async with pipeline(FakePool()) as made:
        reply = await made.run(plan_of(ImageInput(data=draw(), targets=["tabby"])))
    assert reply.results[0].predictions


# ---------------------------------------------------------------- arrays in place of files


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
async def test_pixels_are_resized_like_the_file_that_holds_them(mode: str) -> None:
    image = Image.open(io.BytesIO(draw())).convert("RGBA")
    image.putalpha(image.getchannel("R"))
    image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    options = ExplainOptions(canvas="original", outputs=["overlay", "values"])
    pool = FakePool()
    async with pipeline(pool) as made:
        reply = await made.run(
            plan_of(ImageInput(data=buffer.getvalue()), ImageInput(data=pixels), options=options)
        )
    assert reply.results[0] == reply.results[1]


@pytest.mark.parametrize(
    ("shape", "error"), [((1, 9, 3), ImageTooSmall), ((400, 251, 3), ImageTooLarge)]
)
async def test_pixels_keep_to_the_limits_of_images(
    shape: tuple[int, ...], error: type[Exception]
) -> None:
    await FakePool().start()
    with ThreadPoolExecutor(2) as threads:
        pool = FakePool()
        made = Pipeline(
            pool,
            admission=Admission(pool),
            limits=DecodeLimits(max_pixels=100_000),
            threads=threads,
        )
        with pytest.raises(error):
            await made.run(plan_of(ImageInput(data=np.zeros(shape, np.uint8))))


async def test_normalised_values_reach_the_device_as_they_are() -> None:
    values = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)
    options = ExplainOptions(canvas="original", outputs=["heatmap", "values"])
    pool = FakePool(fault=lambda job: ImageUndecodable("as planned"))
    async with pipeline(pool) as made:
        with pytest.raises(ImageUndecodable):
            await made.run(plan_of(ImageInput(data=values), options=options))
    assert pool.submitted[0].input is values


@pytest.mark.parametrize(
    ("values", "outputs", "field"),
    [
        (np.zeros((3, 32, 32)), ["overlay"], "outputs"),
        (np.zeros((3, 32, 31)), ["values"], None),
        (np.zeros((1, 32, 32)), ["values"], None),
        (np.full((3, 32, 32), np.nan), ["values"], None),
        (np.full((3, 32, 32), -np.inf), ["values"], None),
    ],
)
async def test_normalised_values_that_are_refused(
    values: np.ndarray, outputs: list[str], field: str | None
) -> None:
    pool = FakePool()
    image = ImageInput(data=values.astype(np.float32))
    async with pipeline(pool) as made:
        with pytest.raises(InvalidOption) as caught:
            await made.run(plan_of(image, options=ExplainOptions(outputs=outputs)))
    assert caught.value.field == field
    assert not pool.submitted
