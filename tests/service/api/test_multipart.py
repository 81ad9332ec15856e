"""The form parser against httpx's encoder, in any pieces, and against any bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import HeatlensError, ImageTooLarge
from service.api.multipart import IMAGE_NAMES, Form, read_form
from service.settings import LimitSettings

LIMITS = LimitSettings(max_image_mb=0.001, max_options_kb=1.0, max_images=5)
CONTENT_TYPE = "multipart/form-data; boundary=XX"

names = st.text(st.characters(exclude_characters='"\\\r\n', codec="utf-8"), min_size=1, max_size=16)


def parse(body: bytes, content_type: str, *, cuts: list[int] | None = None) -> Form:
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts or [])})

    async def chunks() -> AsyncIterator[bytes]:
        for start, stop in itertools.pairwise(places):
            yield body[start:stop]

    return asyncio.run(read_form(chunks(), content_type=content_type, limits=LIMITS))


@given(
    images=st.lists(st.binary(max_size=300), max_size=5),
    fields=st.lists(
        st.tuples(names.filter(lambda n: n not in IMAGE_NAMES), st.binary(max_size=50)), max_size=5
    ),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
)
def test_what_was_sent_arrives(
    images: list[bytes], fields: list[tuple[str, bytes]], cuts: list[int]
) -> None:
    parts = [("image", ("image.png", data)) for data in images]
    parts += [(name, (None, data)) for name, data in fields]
    if not parts:
        return
    request = httpx.Request("POST", "http://t", files=parts)
    form = parse(request.read(), request.headers["content-type"], cuts=cuts)
    assert form.images == images
    assert form.fields == [(quoted(name), data) for name, data in fields]


def quoted(name: str) -> str:
    """What httpx makes of control characters in a name (the HTML standard's way)."""
    return "".join(f"%{ord(c):02X}" if ord(c) < 32 and c != "\x1b" else c for c in name)


@given(st.binary(max_size=2_000), st.lists(st.integers(0, 2_000), max_size=5))
def test_any_bytes_are_a_form_or_an_error_of_ours(body: bytes, cuts: list[int]) -> None:
    for data in (body, b"--XX\r\n" + body, b"--XX\r\nContent-Disposition: form-data; name=" + body):
        with contextlib.suppress(HeatlensError):
            parse(data, CONTENT_TYPE, cuts=cuts)


@given(st.text(st.characters(max_codepoint=255), max_size=100))  # headers are latin-1
def test_any_content_type_is_read_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(HeatlensError):
        parse(b"--XX--\r\n", f"multipart/form-data; {text}")


@pytest.mark.parametrize("size", [1_000, 1_001])
@pytest.mark.parametrize("cut", [None, 100, 1_050])
def test_the_cap_of_an_image_is_exact(size: int, cut: int | None) -> None:
    files = [("image", bytes(size)), ("image", b"small")]
    request = httpx.Request("POST", "http://t", files=files)
    cuts = [] if cut is None else [cut]
    form = parse(request.read(), request.headers["content-type"], cuts=cuts)
    assert form.images[1] == b"small"
    if size == 1_000:
        assert form.images[0] == bytes(size)
    else:
        assert isinstance(form.images[0], ImageTooLarge)


def test_a_name_in_unicode() -> None:
    body = '--XX\r\nContent-Disposition: form-data; name="größe"\r\n\r\n1\r\n--XX--\r\n'.encode()
    assert parse(body, CONTENT_TYPE).fields == [("größe", b"1")]
