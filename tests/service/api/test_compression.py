"""Compressed bodies: inflated within the cap, refused where they are not what they say."""

from __future__ import annotations

import gzip
import io
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import Response
from hypothesis import given
from hypothesis import strategies as st

from service.api.compression import compressed

pytestmark = pytest.mark.anyio

ENCODERS = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("encoding", ENCODERS)
async def test_a_compressed_image_and_a_compressed_form(
    client: httpx.AsyncClient, png: bytes, encoding: str
) -> None:
    plain = (await client.post("/v1/predict", content=png)).json()["results"]
    headers = {"Content-Encoding": encoding}
    sent = ENCODERS[encoding](png)
    response = await client.post("/v1/predict", content=sent, headers=headers)
    assert response.json()["results"] == plain
    form = httpx.Request("POST", "http://testserver/v1/predict", files={"image": png})
    sent = ENCODERS[encoding](form.read())
    headers |= {"Content-Type": form.headers["content-type"]}

    async def in_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(sent), 100):
            yield sent[start : start + 100]

    response = await client.post("/v1/predict", content=in_pieces(), headers=headers)
    assert response.json()["results"] == plain


async def test_a_bomb_is_refused_before_it_takes_memory(serve: Callable, png: bytes) -> None:
    """A hundred million zeros arrive as a hundred thousand bytes."""
    buffer = io.BytesIO()
    with gzip.open(buffer, "w") as file:
        for _ in range(100):
            file.write(bytes(1_000_000))
    async with serve(limits={"max_body_mb": 2}) as client:
        tracemalloc.start()
        response = await client.post(
            "/v1/predict", content=buffer.getvalue(), headers={"Content-Encoding": "gzip"}
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("encoding", "damage", "status"),
    [
        ("gzip", lambda data: data, 415),
        ("gzip", lambda data: gzip.compress(data)[:-9], 400),
        ("gzip", lambda data: gzip.compress(data) + b"more", 400),
        ("deflate", lambda data: zlib.compress(data)[2:], 415),
        ("deflate", lambda data: b"", 400),
        ("br", lambda data: data, 415),
        ("gzip, gzip", lambda data: gzip.compress(gzip.compress(data)), 415),
    ],
)
async def test_what_is_not_compressed_as_announced(
    client: httpx.AsyncClient,
    png: bytes,
    encoding: str,
    damage: Callable[[bytes], bytes],
    status: int,
) -> None:
    headers = {"Content-Encoding": encoding}
    response = await client.post("/v1/predict", content=damage(png), headers=headers)
    code = {400: "malformed_body", 415: "unsupported_media_type"}[status]
    assert (response.status_code, response.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("gzip", "gzip"),
        ("deflate, gzip;q=0.5", "gzip"),
        ("deflate, gzip;q=0", "deflate"),
        ("gzip; q=0.000, br", None),
        ("identity", None),
        ("", None),
    ],
)
async def test_a_response_is_compressed_as_its_client_asks(
    accept: str, expected: str | None
) -> None:
    body = b"heat" * 1000
    response = await compressed(Response(body), accept_encoding=accept)
    assert response.headers.get("content-encoding") == expected
    assert int(response.headers["content-length"]) == len(response.body)
    assert response.headers["vary"] == "Accept-Encoding"
    if expected:
        assert len(response.body) < 100
        assert zlib.decompress(response.body, zlib.MAX_WBITS | 32) == body


@given(st.text(alphabet="gzipdeflat;q=,0.1* ", max_size=40))
async def test_any_header_is_read(accept: str) -> None:
    small = await compressed(Response(b"small"), accept_encoding=accept)
    assert small.body == b"small"
