"""Decoder processes: the same images as in a thread, and an end for those that cost too much."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import ImageTooLarge, ImageUndecodable
from models.imaging.decode import FORMATS, DecodeLimits, inspect
from models.imaging.prepare import Canvas, PreparedImage, is_light, prepare
from models.types import Preprocess
from service.api.decoders import Decoders
from tests.service.api.conftest import Serve
from tests.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.process]

SPEC = Preprocess(resize=64, crop=(56, 56))
LIMITS = DecodeLimits()


def encoded(image_format: str, *, size: tuple[int, int] = (80, 60)) -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).save(buffer, image_format)
    return buffer.getvalue()


def flat(side: int) -> bytes:
    """A few dozen bytes, and up to a second of work."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()


async def run(decoders: Decoders, data: bytes, *, canvas: Canvas = "none") -> PreparedImage:
    header = inspect(data, limits=LIMITS)
    return await decoders.prepare(data, header=header, limits=LIMITS, spec=SPEC, canvas=canvas)


def making(**limits: float) -> Decoders:
    return Decoders(**{"count": 1, "memory_bytes": 1_000_000_000, "cpu_s": 20.0, **limits})


@pytest.fixture
async def decoders() -> AsyncIterator[Decoders]:
    made = making()
    yield made
    made.close()


async def test_images_are_the_same_as_in_a_thread(decoders: Decoders) -> None:
    for image_format in FORMATS.values():
        data = encoded(image_format, size=(1500, 1200))
        found = await run(decoders, data, canvas="original")
        expected = prepare(data, limits=LIMITS, spec=SPEC, canvas="original")
        assert np.array_equal(found.input, expected.input)
        assert np.array_equal(found.original, expected.original)
        assert found.geometry == expected.geometry


async def test_errors_are_those_of_decoding(decoders: Decoders) -> None:
    data = encoded("TIFF")
    header = inspect(data, limits=LIMITS)
    with pytest.raises(ImageUndecodable, match="damaged or truncated"):
        await decoders.prepare(data[:-2000], header=header, limits=LIMITS, spec=SPEC, canvas="none")
    assert (await run(decoders, data)).geometry.width == 80


async def test_what_libraries_write_does_not_reach_the_log(decoders: Decoders) -> None:
    """libtiff writes a line of plain text for each fault that it finds."""
    await run(decoders, encoded("TIFF"))
    assert outputs_of(decoders._idle[0].pid) == ["/dev/null", "/dev/null"]


async def test_too_much_time_ends_the_process_and_the_next_image_gets_another() -> None:
    decoders = making(cpu_s=0.05)
    try:
        await run(decoders, encoded("GIF"))
        first = decoders._idle[0].pid
        with pytest.raises(ImageTooLarge, match="time"):
            await run(decoders, flat(5000))
        await run(decoders, encoded("GIF"))
        assert decoders._idle[0].pid != first
    finally:
        decoders.close()


async def test_memory_is_bounded() -> None:
    decoders = making(memory_bytes=150_000_000)
    try:
        with pytest.raises(ImageTooLarge, match="memory"):
            await run(decoders, encoded("PNG", size=(6000, 6000)))
        await run(decoders, encoded("GIF"))
    finally:
        decoders.close()


async def test_a_crash_costs_one_image(decoders: Decoders) -> None:
    await run(decoders, encoded("GIF"))
    os.kill(decoders._idle[0].pid, signal.SIGSEGV)
    with pytest.raises(ImageUndecodable):
        await run(decoders, encoded("GIF"))
    await run(decoders, encoded("GIF"))


async def test_cancelling_ends_the_work(decoders: Decoders) -> None:
    await run(decoders, encoded("GIF"))
    process = decoders._idle[0]
    work = asyncio.create_task(run(decoders, flat(7000)))
    await eventually(lambda: not decoders._idle, timeout_s=10)
    work.cancel()
    await asyncio.wait([work])
    assert process.wait(5) == -signal.SIGKILL
    await run(decoders, encoded("GIF"))


def outputs_of(process: int) -> list[str]:
    return [str(Path(f"/proc/{process}/fd/{number}").readlink()) for number in (1, 2)]


def environment_of(process: int) -> bytes:
    return Path(f"/proc/{process}/environ").read_bytes()


async def test_settings_and_keys_stay_outside(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEATLENS_SECURITY__API_KEYS", "a secret")
    await run(decoders, encoded("GIF"))
    environment = environment_of(decoders._idle[0].pid)
    assert b"PATH" in environment
    assert b"secret" not in environment


@pytest.mark.parametrize(
    ("data", "light"),
    [
        (encoded("JPEG", size=(500, 375)), True),
        (encoded("PNG", size=(500, 375)), True),
        (encoded("JPEG", size=(3000, 2000)), False),
        (encoded("WEBP"), False),
        (encoded("TIFF"), False),
        (encoded("GIF"), False),
        (encoded("BMP"), False),
    ],
)
async def test_only_cheap_formats_and_sizes_are_decoded_in_threads(
    data: bytes, light: bool
) -> None:
    assert is_light(inspect(data, limits=LIMITS)) is light


async def test_images_have_a_bound_of_pixels_together(serve: Serve) -> None:
    data = encoded("PNG", size=(100, 100))
    body = {"image": ("a.png", data)}
    async with serve(limits={"max_request_pixels": 25_000}) as client:
        two = await client.post("/v1/predict", files=[("image", body["image"])] * 2)
        assert two.status_code == 200
        three = await client.post("/v1/predict", files=[("image", body["image"])] * 3)
    assert three.status_code == 413
    assert three.json()["code"] == "image_too_large"
    assert three.json()["field"] == "images"


async def test_a_request_for_a_format_that_is_not_light_is_answered(serve: Serve) -> None:
    async with serve() as client:
        for image_format in ("WEBP", "TIFF", "GIF"):
            response = await client.post(
                "/v1/explain",
                params={"canvas": "original"},
                content=encoded(image_format),
                headers={"Content-Type": "application/octet-stream"},
            )
            assert response.status_code == 200, response.text
            result = response.json()["results"][0]
            assert result["explanations"][0]["overlay"]["width"] == 80


async def test_costly_images_do_not_hold_up_cheap_ones(serve: Serve) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    async with serve(limits={"decoders": 1}) as client:

        async def ask(data: bytes) -> None:
            response = await client.post("/v1/predict", content=data, headers=headers)
            assert response.status_code == 200

        costly = [asyncio.create_task(ask(flat(4000))) for _ in range(4)]
        for _ in range(5):
            await ask(encoded("JPEG"))
        assert not all(task.done() for task in costly)
        await asyncio.gather(*costly)
