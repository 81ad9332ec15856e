"""The Python client and the command line against a real service whose engine obeys the images."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from configured import BASE, Configured, configured_services
from fake_engine import Fault, expected_class, image_of
from PIL import Image

from heatlens import APIError, AsyncClient, Client, ConnectionFailed, TimedOut
from tests.waiting import eventually, until

pytestmark = [pytest.mark.process, pytest.mark.slow]

LIMIT = 4
SERVER = {**BASE["server"], "http_workers": 1}
RISE = {"methods": ["rise"], "outputs": ["heatmap"], "statistics": False}


@pytest.fixture(scope="module")
def running() -> Iterator[Configured]:
    """One service for all tests; each sends images of its own."""
    with configured_services() as start:
        yield start(server=SERVER, limits={"max_concurrent_per_key": LIMIT})


@pytest.fixture
def connect(running) -> Callable[..., Client]:
    def connect(kind=Client, **settings):
        url = running.service.url("")
        return kind(url, api_key="one", trust_env=False, **settings)

    return connect


def long(number: int, steps: int = 255):
    """An image whose explanation takes so many steps of 10 ms."""
    return image_of(number, Fault.LONG, steps)


def is_idle(running: Configured) -> bool:
    return running.service.status().queue_depth == 0


def is_busy(running: Configured) -> bool:
    return running.service.status().queue_depth > 0


@contextlib.contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Do something beside the block, and raise what went wrong there."""
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(work)
        yield
        future.result()


# ---------------------------------------------------------------- refusals


@pytest.mark.anyio
async def test_an_overloaded_service_is_asked_again_after_its_retry_after(
    connect, running, monkeypatch
):
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        if seconds > 0.1:
            pauses.append(seconds)
        await sleep(seconds)

    async with connect(AsyncClient) as client:
        first = [asyncio.create_task(client.explain(long(n), **RISE)) for n in range(LIMIT)]
        async with asyncio.timeout(2):
            while (refused := await asyncio.to_thread(running.ask)).status_code != 429:
                pass
        monkeypatch.setattr("heatlens.client.asyncio.sleep", noted)
        response = await client.predict(image_of(100))
        await asyncio.gather(*first)
    assert response.top1.class_id == expected_class(image_of(100))
    assert set(pauses) == {float(refused.headers["Retry-After"])}


def test_without_retries_the_refusal_is_a_typed_error(connect, running):
    with connect(attempts=1) as client:
        batch = list(
            client.explain_many(
                [long(n, 100) for n in range(2 * LIMIT)], in_flight=2 * LIMIT, **RISE
            )
        )
    errors = [item.error for item in batch if item.error]
    assert len(errors) == LIMIT
    assert {(error.code, error.status, error.retryable) for error in errors} == {
        ("overloaded", 429, True)
    }


@pytest.mark.parametrize("call", ["predict", "explain", "features"])
def test_an_unknown_model_is_a_typed_error(connect, call):
    with connect() as client, pytest.raises(APIError) as caught:
        getattr(client, call)(image_of(1), model="nobody")
    error = caught.value
    assert (error.code, error.status, error.field) == ("unknown_model", 404, "model")
    assert not error.retryable


def test_a_wrong_key_is_a_typed_error(running):
    with (
        Client(running.service.url(""), api_key="two", trust_env=False) as client,
        pytest.raises(APIError, match="unauthorized"),
    ):
        client.predict(image_of(1))


# ---------------------------------------------------------------- many images


def test_a_batch_keeps_its_order_and_no_more_in_flight_than_asked(connect):
    images = [image_of(200 + n) for n in range(40)]
    with connect(attempts=1) as client:
        done = list(client.explain_many(images, in_flight=LIMIT, **RISE))
    # One more in flight would have been refused.
    assert [item.error for item in done] == [None] * len(images)
    found = [item.response.top1.class_id for item in done]
    assert found == [expected_class(image) for image in images]


@pytest.mark.anyio
async def test_an_abandoned_batch_ends_its_work(connect, running):
    async with connect(AsyncClient) as client:
        images = [image_of(300), *(long(310 + n) for n in range(LIMIT))]
        batch = client.explain_many(images, in_flight=LIMIT, **RISE)
        assert (await anext(batch)).response.top1.class_id == expected_class(images[0])
        await eventually(lambda: is_busy(running))
        await batch.aclose()
        await eventually(lambda: is_idle(running), timeout_s=1.0)


# ---------------------------------------------------------------- long work


@pytest.mark.anyio
async def test_cancelling_ends_the_work_on_the_device(connect, running):
    async with connect(AsyncClient) as client:
        task = asyncio.create_task(client.explain(long(400), **RISE))
        await eventually(lambda: is_busy(running))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: is_idle(running), timeout_s=1.0)
        assert (await client.predict(image_of(401))).results


def test_the_clients_timeout_is_a_typed_error_and_ends_the_work(connect, running):
    begun = time.monotonic()
    with connect(timeout_s=0.7) as client, pytest.raises(TimedOut, match="timeout_s"):
        client.explain(long(410), **RISE)
    assert time.monotonic() - begun < 2.0
    until(lambda: is_idle(running), timeout_s=1.0)


def test_the_services_deadline_is_a_typed_error(connect):
    with connect() as client, pytest.raises(APIError) as caught:
        client.explain(long(420), timeout_s=1.0, samples=100, **RISE)
    assert (caught.value.code, caught.value.status) == ("deadline_exceeded", 504)


def test_progress_and_partial_maps_come_before_the_result(connect):
    progress, partial = [], []
    with connect() as client:
        response = client.explain(
            long(430, 150), on_progress=progress.append, on_partial=partial.append, **RISE
        )
    shares = [news.share for news in progress]
    assert shares == sorted(shares)
    assert 0 < shares[-1] < 1
    assert partial
    assert {news.image for news in partial} == {0}
    final = response.explanation
    assert partial[-1].explanation.target == final.target
    assert partial[-1].explanation.heatmap.size == final.heatmap.size


# ---------------------------------------------------------------- ends


def test_a_worker_that_is_killed_costs_no_answer(connect, running):
    with connect(attempts=1) as client:
        batch = client.explain_many([long(500, 100)], in_flight=1, **RISE)

        def kill() -> None:
            until(lambda: is_busy(running))
            os.kill(running.service.worker_pid(), signal.SIGKILL)

        with in_background(kill):
            (item,) = batch
    assert item.error is None
    assert item.response.top1.class_id == expected_class(long(500, 100))


def test_an_image_that_kills_workers_is_a_typed_error(connect, running):
    with connect() as client, pytest.raises(APIError) as caught:
        client.explain(image_of(510, Fault.KILL), **RISE)
    assert (caught.value.code, caught.value.retryable) == ("input_quarantined", False)
    until(running.is_ready)


def test_a_service_that_is_killed_is_a_typed_error():
    with configured_services() as start:
        service = start(server=SERVER).service
        client = Client(service.url(""), api_key="one", trust_env=False, attempts=2)

        def kill() -> None:
            until(lambda: service.status().queue_depth > 0)
            os.kill(service.process.pid, signal.SIGKILL)

        with client, in_background(kill), pytest.raises(ConnectionFailed, match=service.url("/")):
            client.explain(long(520), **RISE)


# ---------------------------------------------------------------- command line


def test_the_bar_of_the_command_line_moves_within_an_image(running, tmp_path):
    Image.fromarray(long(600, 200)).save(tmp_path / "image.png")
    done = command(
        running, "explain", tmp_path, "-o", tmp_path / "out", "-m", "rise", FORCE_COLOR="1"
    )
    assert done.returncode == 0, done.stderr
    assert re.search("0:00:0[1-9]", done.stderr), (
        "the time left of a single image is known while it is explained"
    )


def test_the_command_line_reports_what_the_service_refuses(running, tmp_path):
    Image.fromarray(image_of(610)).save(tmp_path / "image.png")
    done = command(running, "explain", tmp_path, "-o", tmp_path / "out", "--model", "nobody")
    assert done.returncode == 2
    assert "--model" in done.stderr
    assert "Traceback" not in done.stderr


def command(
    running: Configured, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "service",
            *map(str, arguments),
            "--server",
            running.service.url(""),
        ],
        env={**os.environ, "HEATLENS_API_KEY": "one", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
