"""The three forms of a body: the same response to each, and every error in one."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.fakes import FakePool

pytestmark = pytest.mark.anyio

OPTIONS = {"methods": ["gradcam", "layercam"], "targets": ["top1", "goldfish"], "alpha": 0.25}
QUERY = {"methods": "gradcam,layercam", "targets": ["top1", "goldfish"], "alpha": "0.25"}


def same(response: httpx.Response) -> Any:
    """The parts of a response that must not depend on the form."""
    assert response.status_code == 200, response.text
    body = response.json()
    return body["model"], body["results"]


async def test_every_form_gives_the_same_response(
    client: httpx.AsyncClient, png: bytes, b64: str
) -> None:
    url = "/v1/explain"
    data_url = f"data:image/png;base64,{b64}"
    lines = "\n".join(b64[i : i + 76] for i in range(0, len(b64), 76))
    options = ("options", (None, json.dumps(OPTIONS), "application/json"))
    part = ("image", ("cat.png", png, "image/png"))
    fields = {"methods": "gradcam,layercam", "targets": "top1,goldfish", "alpha": "0.25"}
    responses = [
        await client.post(url, content=png, headers={"Content-Type": "image/png"}, params=QUERY),
        await client.post(url, content=png, headers={"Content-Type": "image/jpeg"}, params=QUERY),
        await client.post(
            url, content=png, headers={"Content-Type": "application/octet-stream"}, params=QUERY
        ),
        await client.post(url, content=png, params=QUERY),
        await client.post(url, files=[part], params=QUERY),
        await client.post(url, files=[part, options]),
        await client.post(url, files=[options, part]),
        await client.post(url, files=[part], data=fields),
        await client.post(url, json={"images": [{"b64": b64}], **OPTIONS}),
        await client.post(url, json={"images": [{"b64": data_url}], **OPTIONS}),
        await client.post(url, json={"images": [{"b64": lines}], **OPTIONS}),
        await client.post(url, json={"images": [{"b64": b64}]}, params=QUERY),
        await client.post(url, content=json.dumps({"images": [{"b64": b64}], **OPTIONS})),
    ]
    first = same(responses[0])
    assert len(first[1][0]["explanations"]) == 4
    for response in responses[1:]:
        assert same(response) == first


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
async def test_every_image_format(
    client: httpx.AsyncClient, draw: Callable[..., bytes], image_format: str
) -> None:
    response = await client.post("/v1/predict", content=draw(image_format=image_format))
    assert response.status_code == 200


async def test_a_body_in_pieces(client: httpx.AsyncClient, png: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for i in range(0, len(png), 7):
            yield png[i : i + 7]

    assert (await client.post("/v1/predict", content=pieces())).status_code == 200


async def test_body_beats_query(client: httpx.AsyncClient, pool: FakePool, b64: str) -> None:
    body = {"images": [{"b64": b64}], "top_k": 2}
    await client.post("/v1/predict", json=body, params={"top_k": 3})
    assert pool.submitted[0].options.top_k == 2


async def test_repeated_and_comma_separated_lists_mix(
    client: httpx.AsyncClient, pool: FakePool, png: bytes
) -> None:
    params = [("targets", "0, 1"), ("targets", "tiger cat"), ("targets", "")]
    await client.post("/v1/explain", content=png, params=params)
    values = [target.cls.value for target in pool.submitted[0].options.targets]
    # One class by two names is one target.
    assert values == [0, 1]


@pytest.mark.parametrize(
    "name", ["image", "image[]", "images", "file", "files[]", "data", "upload"]
)
async def test_usual_names_of_an_image_part(
    serve: Callable[..., Any], pool: FakePool, png: bytes, name: str
) -> None:
    large = png + bytes(70_000)
    async with serve(limits={"max_image_mb": 0.08}) as client:
        for data in (png, large):
            answer = await client.post(
                "/v1/predict", files=[(name, ("cat.png", data, "image/png"))]
            )
            assert answer.status_code == 200, answer.text
        too_large = await client.post("/v1/predict", files={name: png + bytes(90_000)})
        assert too_large.json()["code"] == "image_too_large"


@pytest.mark.parametrize(
    "media_type", ["image/png", "image/x-png", "application/octet-stream", None]
)
async def test_a_file_of_any_name_is_an_image(
    client: httpx.AsyncClient, png: bytes, media_type: str | None
) -> None:
    kind = f"Content-Type: {media_type}\r\n" if media_type else ""
    head = f'Content-Disposition: form-data; name="cat"; filename="cat.png"\r\n{kind}\r\n'
    answer = await client.post("/v1/predict", **form(head.encode() + png))
    assert answer.status_code == 200, answer.text


async def test_options_in_a_file_are_no_image(client: httpx.AsyncClient, png: bytes) -> None:
    for media_type in ("application/json", "application/octet-stream"):
        files = {"image": png, "options": ("options.json", b'{"top_k": 1}', media_type)}
        answer = await client.post("/v1/predict", files=files)
        assert len(answer.json()["results"][0]["predictions"]) == 1


async def test_a_text_file_is_no_image(client: httpx.AsyncClient, png: bytes) -> None:
    files = {"image": png, "notes": ("notes.txt", b"hello", "text/plain")}
    answer = await client.post("/v1/predict", files=files)
    assert (answer.json()["code"], answer.json()["field"]) == ("invalid_option", "notes")


async def test_parts_that_are_too_large_are_named(client: httpx.AsyncClient, png: bytes) -> None:
    files = {"image": png, "notes": (None, bytes(70_000))}
    answer = await client.post("/v1/predict", files=files)
    assert answer.json()["code"] == "body_too_large"
    assert "`notes`" in answer.json()["error"]


async def test_an_empty_part_is_called_empty(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/predict", files={"image": ("a.png", b"")})
    assert answer.json()["error"] == "The image part of the form is empty."


@pytest.mark.parametrize(
    "media_type", ["image/jpg", "image/pjpeg", "image/x-png", "image/x-ms-bmp"]
)
async def test_old_names_of_media_types(
    client: httpx.AsyncClient, png: bytes, media_type: str
) -> None:
    headers = {"Content-Type": media_type}
    assert (await client.post("/v1/predict", content=png, headers=headers)).status_code == 200


@pytest.mark.parametrize("size", [0, 1, 2])
async def test_base64_of_other_encoders(client: httpx.AsyncClient, png: bytes, size: int) -> None:
    # Bytes after the end of a PNG do not count: padding of every length, both odd digits.
    data = png + bytes([0xFB, 0xFF, 0xFE]) * 3 + bytes(size)
    standard, url_safe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
    assert "-" in url_safe
    assert "_" in url_safe
    for text in (
        standard,
        standard.rstrip("="),
        url_safe,
        url_safe.rstrip("="),
        f" {url_safe}\r\n",
    ):
        for b64 in (text, f"data:image/png;base64,{text}"):
            answer = await client.post("/v1/predict", json={"images": [{"b64": b64}]})
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "The base64 is empty."),
        ("==", "The base64 is empty."),
        ("iVBOR", "The base64 is cut off."),
        ("@@@@", "The text has characters that are not base64."),
        ("data:image/svg+xml;utf8,<svg/>", "The text has characters that are not base64."),
        ("iVBO=Rw0", "The text has characters that are not base64."),
    ],
)
async def test_what_is_wrong_with_base64(client: httpx.AsyncClient, text: str, error: str) -> None:
    answer = await client.post("/v1/predict", json={"images": [{"b64": text}]})
    assert (answer.status_code, answer.json()["error"]) == (422, error)
    assert answer.json()["field"] == "images.0.b64"


async def test_what_decoding_assumed_is_said(client: httpx.AsyncClient, png: bytes) -> None:
    deep = io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(deep, "PNG")
    files = [("image", png), ("image", deep.getvalue())]
    for operation in ("predict", "explain", "features"):
        plain, narrow = (await client.post(f"/v1/{operation}", files=files)).json()["results"]
        assert "warnings" not in plain
        (warning,) = narrow["warnings"]
        assert "12 bits" in warning


# ---------------------------------------------------------------- refused


def form(*parts: bytes, boundary: str = "XX") -> dict[str, Any]:
    body = b"".join(b"--XX\r\n" + part + b"\r\n" for part in parts) + b"--XX--\r\n"
    return {
        "content": body,
        "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    }


def part(name: str, data: bytes) -> bytes:
    return f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + data


BAD: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "empty": ({"content": b""}, 400, "malformed_body", None),
    "blank": ({"content": b" \n"}, 400, "malformed_body", None),
    "not an image": ({"content": b"hello"}, 415, "unsupported_media_type", None),
    "svg": (
        {"content": b"<svg/>", "headers": {"Content-Type": "image/svg+xml"}},
        415,
        "unsupported_media_type",
        None,
    ),
    "urlencoded": (
        {"content": b"x=1", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        415,
        "unsupported_media_type",
        None,
    ),
    "cut JSON": (
        {"content": b'{"images": [', "headers": {"Content-Type": "application/json"}},
        400,
        "malformed_body",
        None,
    ),
    "deep JSON": (
        {"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}},
        400,
        "malformed_body",
        None,
    ),
    "long number": (
        {"content": b"1" * 9_000, "headers": {"Content-Type": "application/json"}},
        400,
        "malformed_body",
        None,
    ),
    "JSON list": ({"json": [1]}, 400, "malformed_body", None),
    "no images": ({"json": {"top_k": 1}}, 422, "invalid_option", "images"),
    "zero images": ({"json": {"images": []}}, 422, "invalid_option", "images"),
    "images no list": ({"json": {"images": {"b64": ""}}}, 422, "invalid_option", "images"),
    "image no object": ({"json": {"images": ["abc"]}}, 422, "invalid_option", "images.0"),
    "no source": ({"json": {"images": [{}]}}, 422, "invalid_option", "images.0"),
    "two sources": (
        {"json": {"images": [{"b64": "aaaa", "url": "https://a.example"}]}},
        422,
        "invalid_option",
        "images.0",
    ),
    "unknown key": (
        {"json": {"images": [{"b65": "aaaa"}]}},
        422,
        "invalid_option",
        "images.0.b65",
    ),
    "bad base64": (
        {"json": {"images": [{"b64": "@@@"}]}},
        422,
        "image_undecodable",
        "images.0.b64",
    ),
    "not ASCII base64": (
        {"json": {"images": [{"b64": "añb="}]}},
        422,
        "image_undecodable",
        "images.0.b64",
    ),
    "cut base64": (
        {"json": {"images": [{"b64": "iVBOR"}]}},
        422,
        "image_undecodable",
        "images.0.b64",
    ),
    "url": (
        {"json": {"images": [{"url": "https://a.example/cat.jpg"}]}},
        403,
        "url_input_disabled",
        "images.0.url",
    ),
    "form without boundary": (
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
        400,
        "malformed_body",
        None,
    ),
    "form of another boundary": (
        form(part("image", b"x"), boundary="YY"),
        400,
        "malformed_body",
        None,
    ),
    "form without image": (form(part("options", b"{}")), 400, "malformed_body", None),
    "empty form": (form(), 400, "malformed_body", None),
    "part without name": (form(b"A: b\r\n\r\nx"), 400, "malformed_body", None),
    "options not JSON": (
        form(part("image", b"x"), part("options", b"{")),
        400,
        "malformed_body",
        None,
    ),
    "field not text": (
        form(part("image", b"x"), part("top_k", b"\xff")),
        400,
        "malformed_body",
        None,
    ),
    "unknown field": (
        form(part("image", b"x"), part("tpo_k", b"1")),
        422,
        "invalid_option",
        "tpo_k",
    ),
    "wrong field": (
        form(part("image", b"x"), part("top_k", b"many")),
        422,
        "invalid_option",
        "top_k",
    ),
    "too many fields": (
        form(part("image", b"x"), *[part("targets", b"1")] * 80),
        400,
        "malformed_body",
        None,
    ),
    "cut form": (
        {
            "content": form(part("image", b"x" * 99))["content"][:80],
            "headers": {"Content-Type": "multipart/form-data; boundary=XX"},
        },
        400,
        "malformed_body",
        None,
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_wrong_bodies(client: httpx.AsyncClient, name: str) -> None:
    request, status, code, field = BAD[name]
    response = await client.post("/v1/predict", **request)
    body = response.json()
    assert (response.status_code, body["code"], body.get("field")) == (status, code, field)
    assert body["retryable"] is False


async def test_a_form_cut_after_its_first_image(client: httpx.AsyncClient, png: bytes) -> None:
    whole = form(part("image", png), part("image", png))
    for end in (-4, -100, -len(png) - 10):
        response = await client.post(
            "/v1/predict", content=whole["content"][:end], headers=whole["headers"]
        )
        assert (response.status_code, response.json()["code"]) == (400, "malformed_body")


async def test_an_empty_json_body_is_malformed(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/predict", headers={"Content-Type": "application/json"})
    assert response.json()["code"] == "malformed_body"


# ---------------------------------------------------------------- limits


async def test_body_limit(serve: Callable[..., Any], png: bytes) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield bytes(1000)

    async with serve(limits={"max_body_mb": 0.02}) as client:
        announced = await client.post("/v1/predict", content=png + bytes(20_000))
        streamed = await client.post("/v1/predict", content=endless())
        assert read <= 22  # it stops where the limit is passed
        lied = await client.post("/v1/predict", content=endless(), headers={"Content-Length": "5"})
        exact = await client.post("/v1/predict", content=bytes(20_000))
    for response in (announced, streamed, lied):
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    assert exact.json()["code"] == "unsupported_media_type"


async def test_a_body_too_large_is_refused_before_it_is_read(
    serve: Callable[..., Any],
) -> None:
    read = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield bytes(1000)

    async with serve(limits={"max_body_mb": 0.02}) as client:
        headers = {"Content-Length": "100000"}
        await client.post("/v1/predict", content=counted(), headers=headers)
    assert read <= 1


async def test_image_limits(serve: Callable[..., Any], png: bytes) -> None:
    large = png + bytes(10_000)
    b64 = base64.b64encode(large).decode()
    async with serve(limits={"max_image_mb": 0.01}) as client:
        raw = await client.post("/v1/predict", content=large)
        coded = await client.post("/v1/predict", json={"images": [{"b64": b64}]})
        alone = await client.post("/v1/predict", files=[("image", large)])
        both = await client.post("/v1/predict", files=[("image", large), ("image", png)])
    for response in (raw, coded, alone):
        assert (response.status_code, response.json()["code"]) == (413, "image_too_large")
    assert both.status_code == 200
    results = both.json()["results"]
    assert results[0] == {
        "error": {"code": "image_too_large", "error": "The image has more than 10000 bytes."}
    }
    assert results[1]["predictions"]


async def test_pixel_limits(serve: Callable[..., Any], draw: Callable[..., bytes]) -> None:
    async with serve(limits={"max_pixels": 4_000}) as client:
        large = await client.post("/v1/predict", content=draw(size=(80, 60)))
        small = await client.post("/v1/predict", content=draw(size=(1, 60)))
    assert (large.status_code, large.json()["code"]) == (413, "image_too_large")
    assert (small.status_code, small.json()["code"]) == (422, "image_too_small")


async def test_image_count(serve: Callable[..., Any], png: bytes, b64: str) -> None:
    async with serve(limits={"max_images": 2}) as client:
        form = await client.post("/v1/predict", files=[("image", png)] * 3)
        coded = await client.post("/v1/predict", json={"images": [{"b64": b64}] * 3})
        fine = await client.post("/v1/predict", files=[("image", png)] * 2)
    for response in (form, coded):
        assert (response.status_code, response.json()["code"]) == (413, "too_many_images")
    assert fine.status_code == 200


async def test_options_limit(serve: Callable[..., Any], png: bytes) -> None:
    async with serve(limits={"max_options_kb": 1}) as client:
        options = ("options", (None, " " * 2_000 + "{}", "application/json"))
        response = await client.post("/v1/predict", files=[("image", png), options])
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


async def test_results_limit(serve: Callable[..., Any], png: bytes) -> None:
    async with serve(limits={"max_results": 7}) as client:
        params = {"methods": "gradcam,layercam", "targets": "0,1"}
        fine = await client.post("/v1/explain", content=png, params=params)
        many = await client.post("/v1/explain", files=[("image", png)] * 2, params=params)
        fused = await client.post(
            "/v1/explain", content=png, params={**params, "layers": "stem,body", "fuse": "mean"}
        )
        features = await client.post(
            "/v1/features", content=png, params={"kinds": "output,input,grad_output"}
        )
    assert (fine.status_code, fused.status_code) == (200, 200)
    for response in (many, features):
        assert (response.status_code, response.json()["code"]) == (422, "invalid_option")
