"""Inference by the Open Inference Protocol: inputs, outputs, options, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import struct
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from models.errors import InvalidOption, MalformedBody
from service.api.app import create_app
from service.api.dialects.v2.tensors import read_request
from service.api.options import ExplainOptions, properties
from service.settings import Settings
from tests.fakes import LABELS, FakePool, fake_info

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/efficientnet_lite0"
LENGTH = "Inference-Header-Content-Length"


def image_input(*elements: str, **parameters: Any) -> dict[str, Any]:
    return {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(elements)],
        "data": list(elements),
        "parameters": parameters,
    }


def array_input(array: np.ndarray, datatype: str) -> dict[str, Any]:
    shape = list(array.shape)
    return {"name": "image", "datatype": datatype, "shape": shape, "data": array.tolist()}


def with_binary(document: dict[str, Any], *parts: bytes) -> dict[str, Any]:
    """A request whose inputs are binary, as arguments of httpx."""
    for item, part in zip(document["inputs"], parts, strict=True):
        item.setdefault("parameters", {})["binary_data_size"] = len(part)
        item.pop("data", None)
    text = json.dumps(document).encode()
    return {"content": text + b"".join(parts), "headers": {LENGTH: str(len(text))}}


def element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def read(response: httpx.Response) -> dict[str, Any]:
    """The outputs by name: arrays, or lists of bytes."""
    assert response.status_code == 200, response.text
    length = response.headers.get(LENGTH)
    split = int(length) if length else len(response.content)
    document = json.loads(response.content[:split])
    rest, found = response.content[split:], {}
    for output in document["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        is_text = output["datatype"] == "BYTES"
        if size is None:
            values = output["data"]
            if output.get("parameters", {}).get("content_type") == "base64":
                values = [base64.b64decode(value) for value in values]
            elif is_text:
                values = [value.encode() for value in values]
        else:
            part, rest = rest[:size], rest[size:]
            values = [] if is_text else np.frombuffer(part, "<f4")
            if is_text:
                while part:
                    (n,) = struct.unpack("<I", part[:4])
                    values.append(part[4 : 4 + n])
                    part = part[4 + n :]
        if not is_text:
            values = np.array(values, "f4").reshape(output["shape"])
        assert len(values) == output["shape"][0] * (np.prod(output["shape"][1:]) if is_text else 1)
        found[output["name"]] = values
    assert not rest
    return found


async def native(client: httpx.AsyncClient, png: bytes, path: str = "explain", **options: Any):
    body = {"images": [{"b64": base64.b64encode(png).decode()}], **options}
    return (await client.post(f"/v1/{path}", json=body)).json()["results"][0]


# ---------------------------------------------------------------- outputs


async def test_a_prediction(client: httpx.AsyncClient, png: bytes, b64: str) -> None:
    response = await client.post(f"{MODEL}/infer", json={"id": "x7", "inputs": [image_input(b64)]})
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document["model_name"] == "efficientnet_lite0"
    assert document["model_version"] == "1"
    assert document["id"] == "x7"
    found = read(response)
    assert list(found) == ["scores", "probabilities", "labels"]
    for prediction in (await native(client, png, "predict"))["predictions"]:
        index = prediction["class_id"]
        assert found["scores"][0, index] == np.float32(prediction["score"])
        assert found["probabilities"][0, index] == np.float32(prediction["probability"])
    assert found["labels"][0].decode() == LABELS[found["scores"][0].argmax()]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("where", ["path", "suffix", "parameter", "encoded", "version"])
async def test_an_explanation_is_that_of_the_native_api(
    client: httpx.AsyncClient, png: bytes, b64: str, where: str, binary: bool
) -> None:
    path = {
        "path": f"{MODEL}/explain",
        "suffix": f"{MODEL}:explain/infer",
        "encoded": f"{MODEL}%3Aexplain/infer",
        "parameter": f"{MODEL}/infer",
        "version": f"{MODEL}/versions/1/explain",
    }[where]
    names = ["overlay", "heatmap", "heatmap_png", "result"]
    document: dict[str, Any] = {
        "inputs": [image_input(b64)],
        "outputs": [{"name": n, "parameters": {"binary_data": binary}} for n in names],
        "parameters": {"methods": "layercam", "targets": 2, "alpha": 0.7},
    }
    if where == "parameter":
        document["parameters"]["explain"] = True
    response = await client.post(path, json=document)
    found = read(response)
    assert list(found) == names
    assert (response.headers["content-type"] == "application/octet-stream") is binary
    options = {"methods": ["layercam"], "targets": [2], "alpha": 0.7}
    outputs = ["heatmap", "overlay", "values"]
    expected = await native(client, png, outputs=outputs, **options)
    explanation = expected["explanations"][0]
    values = base64.b64decode(explanation["values"]["data"])
    assert found["heatmap"].tobytes() == values
    assert found["heatmap"].shape == (1, *explanation["values"]["shape"])
    assert found["overlay"] == [base64.b64decode(explanation["overlay"]["data"])]
    assert found["heatmap_png"] == [base64.b64decode(explanation["heatmap"]["data"])]
    (result,) = found["result"]
    assert json.loads(result) == expected


async def test_several_images_and_several_explanations(
    client: httpx.AsyncClient, draw: Callable[..., bytes]
) -> None:
    pngs = [draw(seed) for seed in range(3)]
    images = [base64.b64encode(data).decode() for data in pngs]
    options = {"methods": "gradcam,layercam", "targets": "top1,goldfish"}
    document = {"inputs": [image_input(*images)], "parameters": options}
    found = read(await client.post(f"{MODEL}/explain", json=document))
    assert found["heatmap"].shape == (3, 4, 7, 7)
    assert len(found["overlay"]) == 12
    lists = {name: text.split(",") for name, text in options.items()}
    for i, data in enumerate(pngs):
        expected = await native(client, data, outputs=["values", "overlay"], **lists)
        for e, explanation in enumerate(expected["explanations"]):
            values = base64.b64decode(explanation["values"]["data"])
            assert found["heatmap"][i, e].tobytes() == values
            assert found["overlay"][4 * i + e] == base64.b64decode(explanation["overlay"]["data"])


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        ("heatmap", ["heatmap_png"]),
        ("values,heatmap", ["heatmap", "heatmap_png"]),
        ("overlay", ["overlay"]),
    ],
)
async def test_the_option_outputs_chooses_the_default_ones(
    client: httpx.AsyncClient, b64: str, outputs: str, names: list[str]
) -> None:
    document = {"inputs": [image_input(b64)], "parameters": {"outputs": outputs}}
    found = read(await client.post(f"{MODEL}/explain", json=document))
    assert list(found) == ["scores", "probabilities", "labels", *names]


async def test_only_what_is_asked_for_is_computed(
    client: httpx.AsyncClient, pool: FakePool, b64: str
) -> None:
    document = {"inputs": [image_input(b64)], "outputs": [{"name": "labels"}]}
    document["parameters"] = {"top_k": 2}
    found = read(await client.post(f"{MODEL}/infer", json=document))
    assert [len(found["labels"]), pool.submitted[0].options.top_k] == [2, 2]
    await client.post(f"{MODEL}/infer", json={"inputs": [image_input(b64)]})
    assert pool.submitted[1].options.top_k == len(LABELS)
    await client.post(f"{MODEL}/explain", json={"inputs": [image_input(b64)]})
    assert not pool.submitted[2].options.statistics


async def test_the_classification_extension(client: httpx.AsyncClient, b64: str) -> None:
    wanted = [{"name": "probabilities", "parameters": {"classification": 2}}]
    document = {"inputs": [image_input(b64)], "outputs": wanted}
    found = read(await client.post(f"{MODEL}/infer", json=document))["probabilities"]
    plain = read(await client.post(f"{MODEL}/infer", json={"inputs": [image_input(b64)]}))
    best = plain["probabilities"][0].argsort()[::-1][:2]
    expected = [f"{plain['probabilities'][0, i]:f}:{i}:{LABELS[i]}".encode() for i in best]
    assert found == expected


# ---------------------------------------------------------------- inputs


async def test_every_form_of_an_image(client: httpx.AsyncClient, png: bytes, b64: str) -> None:
    expected = read(await client.post(f"{MODEL}/infer", json={"inputs": [image_input(b64)]}))
    pixels = np.array(Image.open(io.BytesIO(png)))[None]
    column = {**image_input(b64), "shape": [1, 1], "data": [[b64]]}
    raw = {"content": png, "headers": {LENGTH: "0"}}
    forms: dict[str, dict[str, Any]] = {
        "data URL": {"json": {"inputs": [image_input(f"data:image/png;base64,{b64}")]}},
        "marked": {"json": {"inputs": [image_input(b64, content_type="base64")]}},
        "column": {"json": {"inputs": [column]}},
        "pixels": {"json": {"inputs": [array_input(pixels, "UINT8")]}},
        "binary": with_binary({"inputs": [image_input("")]}, element(png)),
        "binary base64": with_binary({"inputs": [image_input("")]}, element(b64.encode())),
        "binary pixels": with_binary({"inputs": [array_input(pixels, "UINT8")]}, pixels.tobytes()),
        "raw": raw,
        "raw with its length": {**raw, "content": element(png)},
        "compressed": {
            "content": gzip.compress(png),
            "headers": {LENGTH: "0", "Content-Encoding": "gzip"},
        },
        "of any content type": {**raw, "headers": {LENGTH: "0", "Content-Type": "text/plain"}},
    }
    for name, form in forms.items():
        response = await client.post(f"{MODEL}/infer", **form)
        assert response.status_code == 200, (name, response.text)
        found = read(response)
        assert found["scores"].tobytes() == expected["scores"].tobytes(), name
        binary = response.headers["content-type"] == "application/octet-stream"
        assert binary is (form.get("headers", {}).get(LENGTH) == "0"), name


async def test_no_content_type_at_all(client: httpx.AsyncClient, b64: str) -> None:
    """Triton's client sends none."""
    body = json.dumps({"inputs": [image_input(b64)], "model_name": "x"}).encode()
    request = client.build_request("POST", f"{MODEL}/infer", content=body)
    assert "content-type" not in request.headers
    assert (await client.send(request)).status_code == 200


@pytest.mark.parametrize("binary", [False, True])
async def test_normalised_values(client: httpx.AsyncClient, pool: FakePool, binary: bool) -> None:
    """The device gets them as they are; there is nothing to draw an overlay on."""
    values = np.random.default_rng(0).random((2, 3, 32, 32), np.float32) - 0.5
    document: dict[str, Any] = {"inputs": [array_input(values, "FP32")]}
    form = with_binary(document, values.tobytes()) if binary else {"json": document}
    response = await client.post(f"{MODEL}/explain", **form)
    received = {job.input.tobytes() for job in pool.submitted}
    assert received == {value.tobytes() for value in values}
    assert list(read(response)) == ["scores", "probabilities", "labels", "heatmap"]
    document = {"inputs": [array_input(values, "FP32")], "outputs": [{"name": "overlay"}]}
    response = await client.post(f"{MODEL}/explain", json=document)
    assert response.status_code == 422
    assert "not an image" in response.json()["error"]


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("name", properties(ExplainOptions))
async def test_every_option_that_has_a_text_is_a_parameter(
    client: httpx.AsyncClient, b64: str, name: str
) -> None:
    """A wrong value is refused by the name of the option, so every one of them is read."""
    for value in ("no such thing", -7.25):
        document = {"inputs": [image_input(b64)], "parameters": {name: value}}
        response = await client.post(f"{MODEL}/explain", json=document)
        assert response.status_code in (404, 422), (name, value)
        assert name in response.json()["field"]


async def test_options_reach_the_pipeline(
    client: httpx.AsyncClient, pool: FakePool, b64: str
) -> None:
    parameters = {
        "methods": "gradcam, layercam",
        "targets": "top1,2",
        "seed": 7,
        "samples": "9",
        "statistics": True,
        "timeout": 5_000_000,
        "priority": 1,
        "sequence_id": 3,
        "triton_x": "y",
    }
    document = {"inputs": [image_input(b64)], "parameters": parameters}
    response = await client.post(f"{MODEL}/explain", json=document)
    assert response.status_code == 200, response.text
    options = pool.submitted[0].options
    assert options.methods == ("gradcam", "layercam")
    assert [target.cls.value for target in options.targets] == [1, 2]
    assert (options.seed, options.samples, options.statistics) == (7, 9, True)
    deadlines = [submission.deadline for submission in pool.submissions]
    await client.post(f"{MODEL}/explain", json={"inputs": [image_input(b64)]})
    assert pool.submissions[1].deadline - deadlines[0] > 20


# ---------------------------------------------------------------- what is refused

GOOD = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["/9j/"]}
BAD: dict[str, tuple[Any, int, str, str | None]] = {
    "not JSON": (b"{", 400, "malformed_body", None),
    "empty": (b"", 400, "malformed_body", None),
    "a list": ([], 422, "invalid_option", None),
    "no inputs": ({}, 422, "invalid_option", "inputs"),
    "empty inputs": ({"inputs": []}, 422, "invalid_option", "inputs"),
    "two inputs": ({"inputs": [GOOD, GOOD]}, 422, "invalid_option", "inputs"),
    "another input": ({"inputs": [{**GOOD, "name": "x"}]}, 422, "invalid_option", "inputs"),
    "no shape": (
        {"inputs": [{k: v for k, v in GOOD.items() if k != "shape"}]},
        422,
        "invalid_option",
        "inputs.0.shape",
    ),
    "no data": (
        {"inputs": [{k: v for k, v in GOOD.items() if k != "data"}]},
        422,
        "invalid_option",
        "inputs.0.data",
    ),
    "shape of text": (
        {"inputs": [{**GOOD, "shape": ["1"]}]},
        422,
        "invalid_option",
        "inputs.0.shape.0",
    ),
    "no images": (
        {"inputs": [{**GOOD, "shape": [0], "data": []}]},
        422,
        "invalid_option",
        "inputs.0.shape",
    ),
    "another count": (
        {"inputs": [{**GOOD, "shape": [2]}]},
        422,
        "invalid_option",
        "inputs.0.shape",
    ),
    "two negatives": (
        {"inputs": [{**GOOD, "shape": [-1, -1]}]},
        422,
        "invalid_option",
        "inputs.0.shape",
    ),
    "more dimensions than arrays have": (
        {"inputs": [{**GOOD, "datatype": "UINT8", "shape": [1] * 65, "data": [1]}]},
        422,
        "invalid_option",
        "inputs.0.shape",
    ),
    "a scalar": (
        {"inputs": [{**GOOD, "shape": [], "data": "/9j/"}]},
        422,
        "invalid_option",
        "inputs.0.shape",
    ),
    "too many": (
        {"inputs": [{**GOOD, "shape": [33], "data": ["/9j/"] * 33}]},
        413,
        "too_many_images",
        None,
    ),
    "another datatype": (
        {"inputs": [{**GOOD, "datatype": "FP64", "data": [1.0]}]},
        422,
        "invalid_option",
        "inputs.0.datatype",
    ),
    "numbers as BYTES": (
        {"inputs": [{**GOOD, "data": [7]}]},
        422,
        "invalid_option",
        "inputs.0.data",
    ),
    "not base64": (
        {"inputs": [{**GOOD, "data": ["?"]}]},
        422,
        "image_undecodable",
        "inputs.0.data",
    ),
    "not an image": ({"inputs": [{**GOOD, "data": ["AAAA"]}]}, 415, "unsupported_media_type", None),
    "pixels out of range": (
        {"inputs": [{**GOOD, "datatype": "UINT8", "shape": [1, 1, 1, 1], "data": [256]}]},
        422,
        "invalid_option",
        "inputs.0.data",
    ),
    "ragged": (
        {"inputs": [{**GOOD, "datatype": "FP32", "data": [[1.0], [1.0, 2.0]]}]},
        422,
        "invalid_option",
        "inputs.0.data",
    ),
    "huge numbers": (
        {"inputs": [{**GOOD, "datatype": "UINT8", "data": [10**30]}]},
        422,
        "invalid_option",
        "inputs.0.data",
    ),
    "no finite value": (
        {"inputs": [{**GOOD, "datatype": "FP32", "shape": [1, 3, 32, 32], "data": [1e300] * 3072}]},
        422,
        "invalid_option",
        None,
    ),
    "values of another size": (
        {"inputs": [{**GOOD, "datatype": "FP32", "shape": [1, 3, 1, 1], "data": [1, 2, 3]}]},
        422,
        "invalid_option",
        None,
    ),
    "an output that is named again and again": (
        {"inputs": [GOOD], "outputs": [{"name": "probabilities"}] * 100},
        422,
        "invalid_option",
        "outputs.1.name",
    ),
    "a hundred thousand parameters": (
        {"inputs": [GOOD], "parameters": {f"triton_{n}": n for n in range(100_000)}},
        413,
        "body_too_large",
        None,
    ),
    "an unknown output": (
        {"inputs": [GOOD], "outputs": [{"name": "heatmap"}]},
        422,
        "invalid_option",
        "outputs.0.name",
    ),
    "an unknown option": (
        {"inputs": [GOOD], "parameters": {"method": "gradcam"}},
        422,
        "invalid_option",
        "parameters.method",
    ),
    "another model": (
        {"inputs": [GOOD], "parameters": {"model": "x"}},
        422,
        "invalid_option",
        "parameters.model",
    ),
    "an option as an object": (
        {"inputs": [GOOD], "parameters": {"top_k": {}}},
        422,
        "invalid_option",
        "parameters",
    ),
    "a negative timeout": (
        {"inputs": [GOOD], "parameters": {"timeout": -1}},
        422,
        "invalid_option",
        "parameters.timeout",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests(client: httpx.AsyncClient, name: str) -> None:
    body, status, code, field = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await client.post(f"{MODEL}/infer", content=content)
    found = response.json()
    assert (response.status_code, found["code"], found.get("field")) == (status, code, field)
    assert response.headers["content-type"] == "application/json"
    assert "$" not in found["error"]  # nothing of the library's own words


@pytest.mark.parametrize(
    ("size", "tail", "length"),
    [
        (3, b"", None),
        (4, element(b"ab"), None),
        (8, element(b"ab") + b"\x09\0", None),
        (7, struct.pack("<I", 2**32 - 1) + b"abc", None),
        ("8", element(b"abcd"), None),
        (0, b"", "99999"),
        (0, b"", "-1"),
        (0, b"", "1" * 40),
    ],
)
async def test_bad_binary_data(
    client: httpx.AsyncClient, size: Any, tail: bytes, length: str | None
) -> None:
    item = {**GOOD, "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [item]}).encode()
    headers = {LENGTH: length or str(len(text))}
    response = await client.post(f"{MODEL}/infer", content=text + tail, headers=headers)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_body")


async def test_one_bad_image_of_several_fails_the_request(
    client: httpx.AsyncClient, b64: str
) -> None:
    document = {"inputs": [image_input(b64, "AAAA")]}
    response = await client.post(f"{MODEL}/infer", json=document)
    assert response.json()["code"] == "unsupported_media_type"


async def test_maps_of_different_sizes_are_not_one_tensor(
    client: httpx.AsyncClient, pool: FakePool, b64: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([7, 9])
    zeros = lambda _: np.eye(next(sizes), dtype=np.float32)  # noqa: E731
    monkeypatch.setattr("tests.fakes.fake_map", zeros)
    parameters = {"methods": "gradcam,layercam"}
    document = {"inputs": [image_input(b64)], "parameters": parameters}
    response = await client.post(f"{MODEL}/explain", json=document)
    assert (response.status_code, response.json()["field"]) == (422, "layers")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v2/models/nope/infer", 404, "unknown_model"),
        ("/v2/models/nope:explain/infer", 404, "unknown_model"),
        (f"{MODEL}/versions/7/infer", 404, "unknown_model"),
        (f"{MODEL}/nope", 404, "unknown_route"),
        ("/v2/nope", 404, "unknown_route"),
        ("/v2/health/live", 405, "method_not_allowed"),
    ],
)
async def test_errors_have_one_shape(
    client: httpx.AsyncClient, b64: str, path: str, status: int, code: str
) -> None:
    response = await client.post(path, json={"inputs": [image_input(b64)]})
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert isinstance(response.json()["error"], str)
    assert response.headers["content-type"] == "application/json"


# ---------------------------------------------------------------- responses


async def test_responses_are_compressed_as_asked(client: httpx.AsyncClient, b64: str) -> None:
    document = {"inputs": [image_input(b64)], "parameters": {"binary_data_output": True}}
    plain = await client.post(
        f"{MODEL}/explain", json=document, headers={"Accept-Encoding": "identity"}
    )
    assert "content-encoding" not in plain.headers
    for encoding in ("gzip", "deflate"):
        response = await client.post(
            f"{MODEL}/explain", json=document, headers={"Accept-Encoding": encoding}
        )
        assert response.headers["content-encoding"] == encoding
        # The length of the JSON is that before compression.
        assert response.headers[LENGTH] == plain.headers[LENGTH]
        assert response.content == plain.content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)
SOME = st.fixed_dictionaries(
    {
        "name": st.just("image"),
        "datatype": st.sampled_from(["BYTES", "UINT8", "FP32", "BOOL"]),
        "shape": st.lists(st.integers(-2, 5), max_size=5) | JSON,
        "data": st.lists(st.integers(-1, 300) | st.floats() | st.text(max_size=4)) | JSON,
    },
    optional={"parameters": st.dictionaries(st.sampled_from(["binary_data_size", "x"]), JSON)},
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    document=st.fixed_dictionaries(
        {"inputs": st.lists(SOME, max_size=2) | JSON},
        optional={
            "id": JSON,
            "outputs": st.lists(st.fixed_dictionaries({"name": st.text() | st.just("scores")})),
            "parameters": st.dictionaries(st.sampled_from(["top_k", "explain", "timeout"]), JSON),
        },
    ),
    tail=st.binary(max_size=40),
    explain=st.booleans(),
)
async def test_no_request_is_a_fault(document: Any, tail: bytes, explain: bool) -> None:
    text = json.dumps(document).encode()
    app = create_app(Settings(), FakePool())
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://testserver"
        ) as client,
    ):
        headers = {LENGTH: str(len(text))} if tail else {}
        response = await client.post(
            f"{MODEL}/{'explain' if explain else 'infer'}", content=text + tail, headers=headers
        )
    assert response.status_code < 500 or response.status_code == 504, response.text
    if response.status_code != 200:
        assert response.json()["error"]


@given(st.binary(max_size=200), st.none() | st.integers(-1, 220).map(str))
def test_no_body_is_a_fault(body: bytes, length: str | None) -> None:
    with contextlib.suppress(InvalidOption, MalformedBody):
        read_request(body, json_bytes=length)


def test_numbers_keep_every_bit() -> None:
    """Float32 values in JSON are read back as the same float32 values."""
    values = np.random.default_rng(0).normal(size=1000).astype("f4")
    text = msgspec.json.encode({"inputs": [array_input(values, "FP32")]})
    _, tensor = read_request(text, json_bytes=None)
    assert np.asarray(tensor.values).tobytes() == values.tobytes()


async def test_a_model_with_many_classes(png: bytes) -> None:
    labels = [f"class {i}" for i in range(1000)]
    app = create_app(Settings(), FakePool([fake_info(labels=labels, size=1024)]))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://testserver"
        ) as client,
    ):
        response = await client.post(f"{MODEL}/infer", content=png, headers={LENGTH: "0"})
    found = read(response)
    assert found["probabilities"].shape == (1, 1000)
    assert found["probabilities"].sum() == pytest.approx(1, rel=1e-5)
    assert len(found["labels"]) == 5
