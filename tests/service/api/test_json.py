"""JSON of many values: refused before it is parsed, and never on the event loop."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable

import httpx
import pytest

pytestmark = pytest.mark.anyio

IMAGE = b'{"b64":"%s"}'


def body(options: bytes, images: bytes) -> bytes:
    return b'{"images":[' + images + b"]" + (b"," + options if options else b"") + b"}"


async def post(
    client: httpx.AsyncClient, content: bytes, path: str = "/v1/predict"
) -> httpx.Response:
    return await client.post(path, content=content, headers={"Content-Type": "application/json"})


MANY: dict[str, Callable[[bytes], bytes]] = {
    "a million unknown options": lambda image: body(
        b",".join(b'"k%d":1' % i for i in range(1_000_000)), image
    ),
    "six million empty lists": lambda image: body(
        b'"targets":[' + b"[]," * 6_000_000 + b"1]", image
    ),
    "six million images": lambda _: b'{"images":[' + b"{}," * 6_000_000 + b"{}]}",
    "nested lists": lambda image: body(b'"targets":' + b"[" * 200_000 + b"]" * 200_000, image),
    "three million outputs": lambda image: body(b'"outputs":[' + b"1," * 3_000_000 + b"1]", image),
}


@pytest.mark.parametrize("name", MANY)
async def test_very_many_values_are_refused_at_once(
    client: httpx.AsyncClient, b64: str, name: str
) -> None:
    content = MANY[name](IMAGE % b64.encode())
    began = time.process_time()
    response = await post(client, content)
    assert time.process_time() - began < 0.4
    assert response.status_code == 413
    assert response.json()["code"] == "body_too_large"


async def test_many_unknown_options_are_refused_by_the_first(
    client: httpx.AsyncClient, b64: str
) -> None:
    options = b",".join(b'"k%d":1' % i for i in range(90_000))
    image = IMAGE % b64.encode()
    for content, field in (
        (body(options, image), "k0"),
        (body(b"", b'{"b64":"",' + options + b"}"), "images.0.k0"),
    ):
        began = time.process_time()
        response = await post(client, content)
        assert time.process_time() - began < 0.4
        assert response.status_code == 422
        assert response.json()["field"] == field
        assert "nknown" in response.json()["error"]


async def test_many_wrong_channels_are_refused_by_the_first(
    client: httpx.AsyncClient, b64: str
) -> None:
    change = {"layer": "body", "op": "zero", "channels": [-1] * 4096}
    document = {"images": [{"b64": b64}], "interventions": [change] * 16}
    began = time.process_time()
    response = await post(client, json.dumps(document).encode())
    assert time.process_time() - began < 0.4
    assert response.status_code == 422
    assert response.json()["field"] == "interventions.0.channels.0"


async def test_as_many_values_as_a_request_may_need_are_read(
    client: httpx.AsyncClient, b64: str
) -> None:
    change = {"layer": "body", "op": "zero", "channels": [0] * 4096}
    document = {"images": [{"b64": b64}], "interventions": [change] * 16}
    response = await post(client, json.dumps(document).encode())
    assert response.status_code != 413


async def test_a_large_image_is_not_taken_for_many_values(
    client: httpx.AsyncClient, png: bytes
) -> None:
    # White space within base64 is allowed: a body of a megabyte with few values.
    text = base64.encodebytes(png).replace(b"\n", b"\\n") + b"\\n" * 300_000
    response = await post(client, body(b"", IMAGE % text))
    assert response.status_code == 200


async def test_numbers_of_tensors_have_a_bound(client: httpx.AsyncClient) -> None:
    data = b"[" + b"1," * 4_000_000 + b"1]"
    tensor = b'{"name":"image","datatype":"UINT8","shape":[1,1,1,3],"data":' + data + b"}"
    response = await client.post("/v2/models/x/infer", content=b'{"inputs":[' + tensor + b"]}")
    assert response.status_code == 413
