"""KServe's own client, for both of its protocols, and its client for gRPC."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

pytestmark = pytest.mark.conformance

httpx = pytest.importorskip("httpx")
kserve = pytest.importorskip("kserve", exc_type=ImportError)

import numpy as np  # noqa: E402
from expected import MODEL, Native, Service  # noqa: E402


def ask(service: Service, protocol: str, call: Any) -> Any:
    async def run() -> Any:
        config = kserve.RESTConfig(protocol=protocol, timeout=60)
        async with kserve.InferenceRESTClient(config) as client:
            return await call(client)

    return asyncio.run(run())


def request_of(png: bytes, b64: str, *, binary: bool, model: str = MODEL) -> Any:
    image = kserve.InferInput("image", [1], "BYTES")
    data = png if binary else b64.encode()
    image.set_data_from_numpy(np.array([data], dtype=object), binary_data=binary)
    return kserve.InferRequest(model_name=model, infer_inputs=[image], request_id="eight")


# ---------------------------------------------------------------- v1


def test_v1_health(service: Service) -> None:
    assert ask(service, "v1", lambda c: c.is_server_live(service.url)) is True
    assert ask(service, "v1", lambda c: c.is_model_ready(service.url, MODEL)) is True
    with pytest.raises(httpx.HTTPStatusError, match="no such model"):
        ask(service, "v1", lambda c: c.is_model_ready(service.url, "nope"))


@pytest.mark.parametrize("form", ["image", "image_bytes"])
def test_v1_predict_and_explain(service: Service, b64: str, native: Native, form: str) -> None:
    data: dict[str, Any] = {"instances": [{form: {"b64": b64}}]}
    found = ask(service, "v1", lambda c: c.infer(service.url, data, model_name=MODEL))
    assert found["predictions"][0]["predictions"] == native.result["predictions"]
    data |= {"parameters": {"outputs": ["heatmap", "overlay", "values"]}}
    found = ask(service, "v1", lambda c: c.explain(service.url, MODEL, data))
    assert found == {"explanations": [native.result]}


def test_v1_answers_every_instance(service: Service, b64: str, native: Native) -> None:
    data = {"instances": [{"image": {"b64": b64}}, {"image_bytes": {"b64": b64}}]}
    found = ask(service, "v1", lambda c: c.explain(service.url, MODEL, data))
    labels = [prediction["label"] for prediction in native.result["predictions"]]
    # The size of a batch may change the last digit of a score.
    for explanation in found["explanations"]:
        assert [prediction["label"] for prediction in explanation["predictions"]] == labels
    assert len(found["explanations"]) == 2


def test_v1_errors_show_their_text(service: Service) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="characters that are not base64"):
        ask(
            service, "v1", lambda c: c.infer(service.url, {"instances": ["????"]}, model_name=MODEL)
        )


# ---------------------------------------------------------------- v2


def test_v2_health(service: Service) -> None:
    assert ask(service, "v2", lambda c: c.is_server_live(service.url)) is True
    assert ask(service, "v2", lambda c: c.is_server_ready(service.url)) is True
    assert ask(service, "v2", lambda c: c.is_model_ready(service.url, MODEL)) is True
    assert ask(service, "v2", lambda c: c.is_model_ready(service.url, "nope")) is False


@pytest.mark.parametrize("binary", [False, True])
def test_v2_infer(service: Service, png: bytes, b64: str, native: Native, binary: bool) -> None:
    model = f"{MODEL}:explain"
    request = request_of(png, b64, binary=binary, model=model)
    found = ask(service, "v2", lambda c: c.infer(service.url, request, model_name=model))
    assert found.id == "eight"
    outputs = {output.name: output for output in found.outputs}
    heatmap = outputs["heatmap"].as_numpy()
    assert heatmap.shape == (1, *native.shape)
    assert heatmap.astype("<f4").tobytes() == native.heatmap
    overlay = outputs["overlay"].as_numpy()[0]
    assert base64.b64decode(overlay) == native.overlay


def test_v2_errors_show_their_text(service: Service, png: bytes, b64: str) -> None:
    request = request_of(png, b64, binary=True)
    with pytest.raises(httpx.HTTPStatusError, match="no such model"):
        ask(service, "v2", lambda c: c.infer(service.url, request, model_name="nope"))


# ---------------------------------------------------------------- gRPC


def test_grpc(service: Service, png: bytes, b64: str, native: Native) -> None:
    async def run() -> Any:
        client = kserve.InferenceGRPCClient(service.grpc)
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(MODEL)
        model = f"{MODEL}:explain"
        found = await client.infer(request_of(png, b64, binary=True, model=model))
        await client.close()
        return found

    found = asyncio.run(run())
    outputs = {output.name: output for output in found.outputs}
    assert outputs["heatmap"].as_numpy().astype("<f4").tobytes() == native.heatmap
