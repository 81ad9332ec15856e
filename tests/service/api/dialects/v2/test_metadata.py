"""Server, health, models, configuration and statistics by the Open Inference Protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from msgspec import structs

from models.catalog import ModelSpec
from service.devices.pool import DeviceStatus
from service.devices.status import BatchCount
from tests.fakes import LABELS, FakePool, fake_info

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/efficientnet_lite0"


def spec(name: str, version: str = "1") -> ModelSpec:
    return ModelSpec(name=name, version=version, source="timm:resnet10t")


async def test_the_server(client: httpx.AsyncClient) -> None:
    found = (await client.get("/v2")).json()
    assert found["name"] == "heatlens"
    assert found["version"]
    assert "binary_tensor_data" in found["extensions"]
    assert (await client.get("/v2/models")).json() == {"models": ["efficientnet_lite0"]}


async def test_health(client: httpx.AsyncClient, pool: FakePool) -> None:
    response = await client.get("/v2/health/ready")
    assert (response.status_code, response.json()) == (200, {"live": True, "ready": True})
    pool.statuses = [DeviceStatus(device="cpu", state="lost")]
    response = await client.get("/v2/health/ready")
    assert response.status_code == 503
    assert response.json()["ready"] is False
    assert "device cpu: lost" in response.json()["error"]
    response = await client.get("/v2/health/live")
    assert (response.status_code, response.json()["live"]) == (200, True)


async def test_readiness_of_models(client: httpx.AsyncClient, pool: FakePool) -> None:
    for path in (MODEL, f"{MODEL}/versions/1", f"{MODEL}:explain"):
        assert (await client.get(f"{path}/ready")).json()["ready"] is True
    card = structs.replace(fake_info().card, ready=False, state="loading")
    pool.infos = [structs.replace(fake_info(), card=card)]
    response = await client.get(f"{MODEL}/ready")
    assert response.status_code == 503
    assert response.json() == {
        "name": "efficientnet_lite0",
        "ready": False,
        "error": "The model is loading.",
    }


async def test_metadata_and_configuration(client: httpx.AsyncClient) -> None:
    found = (await client.get(MODEL)).json()
    assert found["versions"] == ["1"]
    assert found["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    outputs = {item["name"]: item for item in found["outputs"]}
    assert set(outputs) == {"scores", "probabilities", "labels", "result"}
    assert outputs["scores"]["shape"] == [-1, len(LABELS)]
    explained = (await client.get(f"{MODEL}:explain")).json()
    outputs = {item["name"]: item for item in explained["outputs"]}
    assert outputs["heatmap"] == {"name": "heatmap", "datatype": "FP32", "shape": [-1, -1, -1]}
    assert outputs["overlay"] == {"name": "overlay", "datatype": "BYTES", "shape": [-1]}
    assert explained["name"] == "efficientnet_lite0:explain"
    config = (await client.get(f"{MODEL}/versions/1/config")).json()
    assert config["max_batch_size"] == 32
    assert config["dynamic_batching"]["preferred_batch_size"] == [4]
    assert config["output"][0] == {"name": "scores", "data_type": "TYPE_FP32", "dims": [5]}


async def test_versions(client: httpx.AsyncClient, pool: FakePool, png: bytes) -> None:
    pool.infos = [fake_info(spec("m", version)) for version in ("9", "10")]
    assert (await client.get("/v2/models/m")).json()["versions"] == ["9", "10"]
    raw = {"content": png, "headers": {"Inference-Header-Content-Length": "0"}}
    await client.post("/v2/models/m/versions/9/infer", **raw)
    await client.post("/v2/models/m/infer", **raw)
    assert [job.version for job in pool.submitted] == ["9", "10"]


@pytest.mark.parametrize("tail", ["", "/ready", "/config", "/stats"])
@pytest.mark.parametrize("name", ["nope", "efficientnet_lite0/versions/7", "nope:explain"])
async def test_unknown_models(client: httpx.AsyncClient, name: str, tail: str) -> None:
    response = await client.get(f"/v2/models/{name}{tail}")
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")
    assert response.headers["content-type"] == "application/json"


async def test_statistics_count_what_was_done(
    client: httpx.AsyncClient, pool: FakePool, png: bytes
) -> None:
    pool.infos = [fake_info(spec("m", version)) for version in ("1", "2")]
    before = time.time()
    await client.post("/v1/explain", files=[("image", png)] * 3, params={"model": "m@1"})
    await client.post("/v1/predict", content=png, params={"model": "m@1"})
    await client.post("/v1/predict", content=png, params={"model": "m@1", "timeout_s": 1e-6})
    batches = [
        BatchCount(model="m", version="1", reason=reason, batches=n, images=9)
        for n, reason in ((2, "full"), (3, "idle"))
    ]
    pool.statuses = [structs.replace(pool.statuses[0], batches=tuple(batches))] * 2
    (found,) = (await client.get("/v2/models/m/versions/1/stats")).json()["model_stats"]
    assert (found["name"], found["version"]) == ("m", "1")
    assert found["inference_count"] == 4
    assert found["execution_count"] == 10
    assert before <= found["last_inference"] / 1000 <= time.time()
    stats = found["inference_stats"]
    assert stats["success"]["count"] == 2
    assert stats["fail"]["count"] == 1
    # The fake pool says half a millisecond in the queue and two on the device for each image.
    assert stats["queue"] == {"count": 4, "ns": 2_000_000}
    assert stats["compute_infer"] == {"count": 4, "ns": 8_000_000}
    assert stats["compute_input"]["ns"] > 0
    assert stats["compute_output"]["count"] == 4
    both = (await client.get("/v2/models/stats")).json()["model_stats"]
    assert [(item["version"], item["inference_count"]) for item in both] == [("1", 4), ("2", 0)]
    assert both == (await client.get("/v2/models/m/stats")).json()["model_stats"]
    assert both[1]["last_inference"] == 0


OPEN = {"/", "/livez", "/readyz", "/healthz", "/metrics", "/v2"}
OPEN |= {"/v2/health/live", "/v2/health/ready", "/ping"}


async def test_every_other_route_needs_a_key(serve: Callable[..., Any], png: bytes) -> None:
    """Whatever is added needs one, too, or is added to the set above."""
    async with serve(security={"api_keys": ["user"], "admin_keys": ["admin"]}) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert paths.keys() > OPEN
        for path in paths.keys() - OPEN:
            for method in paths[path]:
                url = path.replace("{", "").replace("}", "")
                response = await client.request(method, url, content=png)
                assert response.status_code == 401, (method, path)
        assert (await client.get(MODEL, headers={"X-API-Key": "user"})).status_code == 200


async def test_requests_of_this_protocol_count_against_a_key(
    serve: Callable[..., Any], pool: FakePool, png: bytes
) -> None:
    pool.delay_s = 0.5
    raw = {"content": png, "headers": {"Inference-Header-Content-Length": "0", "X-API-Key": "k"}}
    async with serve(security={"api_keys": ["k"]}, limits={"max_concurrent_per_key": 1}) as client:
        first = asyncio.create_task(client.post(f"{MODEL}/infer", **raw))
        await pool.arrived.wait()
        assert (await client.post(f"{MODEL}/explain", **raw)).status_code == 429
        assert (await first).status_code == 200
