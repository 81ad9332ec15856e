"""Models, methods, health, metrics, keys, request ids, logs."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from msgspec import structs

from models.catalog import DEFAULT_MODEL, ModelSpec
from models.methods import METHODS
from service.devices.pool import DeviceStatus
from service.devices.status import BatchCount
from service.logs import JsonFormatter, configure_logging
from tests.fakes import LABELS, FakePool, fake_info

pytestmark = pytest.mark.anyio

Serve = Callable[..., Any]


def spec(name: str, version: str = "1") -> ModelSpec:
    return ModelSpec(name=name, version=version, source="timm:resnet10t")


# ---------------------------------------------------------------- models


async def test_card(client: httpx.AsyncClient) -> None:
    card = (await client.get("/v1/models/efficientnet_lite0")).json()
    assert card["name"] == "efficientnet_lite0"
    assert card["ready"] is True
    assert card["versions"] == ["1"]
    assert card["input"] == {
        "height": 32,
        "width": 32,
        "resize": 36,
        "crop": [32, 32],
        "fit": "stretch",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "channels": 3,
        "order": "rgb",
        "bits": 8,
        "padding": None,
        "centre": "even",
    }
    assert card["head"] == "gap_linear"
    assert card["closed_form"] is True
    assert card["latency_ms"] == {"1": 2.0, "4": 6.0}
    assert card["methods"][0] == {"name": "cam", "applicable": True, "reason": None}
    listed = (await client.get("/v1/models")).json()
    assert listed == {
        "models": ["efficientnet_lite0"],
        "default": "efficientnet_lite0",
        "cards": [card],
    }


async def test_labels_and_layers(client: httpx.AsyncClient) -> None:
    labels = await client.get("/v1/models/efficientnet_lite0/labels")
    layers = await client.get("/v1/models/efficientnet_lite0@1/layers")
    assert labels.json() == list(LABELS)
    assert layers.json()[2] == {
        "name": "head.conv",
        "type": "Conv2d",
        "output_shape": [8, 7, 7],
        "spatial": True,
        "parameters": 100,
        "recommended": True,
        "calls": 1,
        "usable": True,
        "reason": "",
    }


async def test_versions(client: httpx.AsyncClient, pool: FakePool, png: bytes) -> None:
    pool.infos = [fake_info(spec("m", version)) for version in ("9", "10", "2")]
    assert (await client.get("/v1/models/m")).json()["version"] == "10"
    assert (await client.get("/v1/models/m@9")).json()["version"] == "9"
    assert (await client.get("/v1/models/m")).json()["versions"] == ["9", "10", "2"]
    await client.post("/v1/predict", content=png, params={"model": "m@2"})
    assert pool.submitted[0].version == "2"
    newest = pool.infos[1]
    broken = structs.replace(newest.card, ready=False, state="unavailable")
    pool.infos[1] = structs.replace(newest, card=broken)
    response = await client.post("/v1/predict", content=png, params={"model": "m"})
    assert response.json()["model"]["version"] == "9"


async def test_a_broken_model_shows_its_reason(client: httpx.AsyncClient, pool: FakePool) -> None:
    card = structs.replace(
        fake_info(spec("m")).card, ready=False, state="unavailable", reason="No such file: w.pth"
    )
    pool.infos = [structs.replace(fake_info(), card=card)]
    response = await client.get("/v1/models/m")
    assert response.status_code == 200
    assert response.json()["ready"] is False
    assert response.json()["reason"] == "No such file: w.pth"


@pytest.mark.parametrize("tail", ["", "/labels", "/layers"])
async def test_unknown_model(client: httpx.AsyncClient, tail: str) -> None:
    response = await client.get(f"/v1/models/nope{tail}")
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")
    assert "field" not in response.json()


async def test_methods(client: httpx.AsyncClient) -> None:
    rows = (await client.get("/v1/methods")).json()
    assert [row["name"] for row in rows] == list(METHODS)
    assert set(rows[0]) == {
        "name",
        "title",
        "paper",
        "formula",
        "family",
        "needs_gradients",
        "assumes_nonnegative",
        "of_input",
        "images",
        "signed",
        "cost",
        "defaults",
    }


# ---------------------------------------------------------------- health


async def test_alive(client: httpx.AsyncClient) -> None:
    for path in ("/", "/livez"):
        response = await client.get(path)
        assert response.status_code == 200
        assert response.json()["status"] == "alive"
        assert response.json()["name"] == "heatlens"
        assert response.json()["docs"] == "/docs"
    assert (await client.get("/docs")).status_code == 200


async def test_ready(client: httpx.AsyncClient) -> None:
    for path in ("/readyz", "/healthz"):
        response = await client.get(path)
        assert (response.status_code, response.json()["ready"]) == (200, True)
        assert response.json()["missing"] == []
        assert response.json()["devices"][0]["device"] == "cpu"


@pytest.mark.parametrize(
    ("status", "missing"),
    [
        (DeviceStatus(device="cpu", state="lost", last_pass_s=0.1), "device cpu: lost"),
        (DeviceStatus(device="cpu", state="starting"), "device cpu: starting"),
        (DeviceStatus(device="cpu", state="draining", last_pass_s=0.1), "device cpu: draining"),
        (None, "no device is known yet"),
    ],
)
async def test_not_ready_without_a_device(
    client: httpx.AsyncClient, pool: FakePool, status: DeviceStatus | None, missing: str
) -> None:
    pool.statuses = [status] if status else []
    response = await client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["ready"] is False
    assert missing in response.json()["missing"]
    assert (await client.get("/livez")).status_code == 200
    up = b'heatlens_device_up{device="cpu"} 0.0'
    assert (up in (await client.get("/metrics")).content) is (status is not None)


async def test_one_lost_device_of_two_is_named(client: httpx.AsyncClient, pool: FakePool) -> None:
    pool.statuses = [*pool.statuses, DeviceStatus(device="cuda:1", state="lost", restarts=2)]
    response = await client.get("/readyz")
    assert response.status_code == 200
    assert response.json()["missing"] == ["device cuda:1: lost"]


async def test_readiness_of_models(serve: Serve, pool: FakePool) -> None:
    models = [spec("main").model_dump(), spec("other").model_dump()]
    async with serve(models=models) as client:
        main, other = fake_info(spec("main")), fake_info(spec("other"))
        pool.infos = [other]
        response = await client.get("/readyz")
        assert response.status_code == 200  # it was unloaded, the others serve on
        assert "model main: not loaded" in response.json()["missing"]
        loading = structs.replace(main.card, ready=False, state="loading")
        pool.infos = [structs.replace(main, card=loading), other]
        response = await client.get("/readyz")
        assert response.status_code == 503  # the default model is still to come
        assert "model main@1: loading" in response.json()["missing"]
        broken = structs.replace(main.card, ready=False, state="unavailable", reason="why")
        pool.infos = [structs.replace(main, card=broken), other]
        response = await client.get("/readyz")
        assert response.status_code == 200  # a broken model does not take the others off the air
        assert response.json()["missing"] == ["model main@1: unavailable"]
        assert response.json()["models"][0]["reason"] is None  # told to admins only
        pool.infos = [structs.replace(main, card=broken)]
        assert (await client.get("/readyz")).status_code == 503


# ---------------------------------------------------------------- metrics


async def test_metrics(client: httpx.AsyncClient, pool: FakePool, png: bytes) -> None:
    await client.post("/v1/explain", content=png)
    await client.post("/v1/predict", files=[("image", png)] * 2)
    await client.post("/v1/predict", content=b"")
    await client.get("/v1/models/efficientnet_lite0")
    await client.get("/no/such/path")
    pool.statuses = [
        structs.replace(
            pool.statuses[0],
            queue_depth=3,
            wait_ms=250,
            restart_reasons={"hang": 2},
            memory_bytes=5_000,
            batches=(BatchCount(model="m", version="2", reason="idle", batches=3, images=7),),
        )
    ]
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = dict(
        line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")
    )
    requests = "http_request_duration_seconds_count"
    assert lines[requests + '{method="POST",route="/v1/explain",status="200"}'] == "1.0"
    assert lines[requests + '{method="POST",route="/v1/predict",status="200"}'] == "1.0"
    assert lines[requests + '{method="POST",route="/v1/predict",status="400"}'] == "1.0"
    assert lines[requests + '{method="GET",route="/v1/models/{name}",status="200"}'] == "1.0"
    assert lines[requests + '{method="GET",route="unmatched",status="404"}'] == "1.0"
    for stage in ("decode", "queue", "device", "render"):
        its = f'{{model="{DEFAULT_MODEL}",operation="predict",stage="{stage}",version="1"}}'
        assert lines["heatlens_stage_duration_seconds_count" + its] == "2.0"
    device = f'{{model="{DEFAULT_MODEL}",operation="explain",stage="device",version="1"}}'
    assert float(lines["heatlens_stage_duration_seconds_sum" + device]) == pytest.approx(0.002)
    assert lines["heatlens_batch_size_count"] == "3.0"
    assert lines["heatlens_batch_size_sum"] == "12.0"
    assert lines["heatlens_inflight"] == "1.0"
    assert lines['heatlens_rejected_total{reason="malformed_body"}'] == "1.0"
    assert lines["heatlens_cancelled_total"] == "0.0"
    assert lines['heatlens_device_up{device="cpu"}'] == "1.0"
    assert lines['heatlens_queue_depth{device="cpu"}'] == "3.0"
    assert lines['heatlens_device_wait_seconds{device="cpu"}'] == "0.25"
    assert lines['heatlens_worker_restarts_total{device="cpu",reason="hang"}'] == "2.0"
    assert lines['heatlens_worker_restarts_total{device="cpu",reason="crash"}'] == "0.0"
    assert lines['heatlens_device_memory_bytes{device="cpu"}'] == "5000.0"
    batches = '{device="cpu",model="m",reason="idle",version="2"}'
    assert lines["heatlens_batches_total" + batches] == "3.0"
    assert lines["heatlens_batch_images_total" + batches] == "7.0"
    model = f'model="{DEFAULT_MODEL}"'
    assert lines[f'heatlens_model_ready{{{model},version="1"}}'] == "1.0"
    served = f'{{code="ok",{model},operation="predict",version="1"}}'
    assert lines["heatlens_request_duration_seconds_count" + served] == "1.0"
    model = '{model_name="efficientnet_lite0"}'
    assert lines["request_preprocess_seconds_count" + model] == "3.0"
    assert lines["request_postprocess_seconds_count" + model] == "3.0"
    assert lines["request_predict_seconds_count" + model] == "2.0"
    assert lines["request_explain_seconds_count" + model] == "1.0"
    # 0.5 ms of queue and 2 ms on the device, for each of two images
    assert float(lines["request_predict_seconds_sum" + model]) == pytest.approx(0.005)


async def test_strange_methods_do_not_become_labels(client: httpx.AsyncClient) -> None:
    for i in range(3):
        await client.request(f"BREW{i}", "/livez")
    text = (await client.get("/metrics")).text
    assert "BREW" not in text
    assert 'method="other",route="/livez",status="405"} 3.0' in text


# ---------------------------------------------------------------- keys


KEYS = {"api_keys": ["open"], "admin_keys": ["root"]}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer nope"}, 401),
        ({"Authorization": "Basic open"}, 401),
        ({"X-API-Key": ""}, 401),
        ({"X-API-Key": "open2"}, 401),
        ({"X-API-Key": "open"}, 200),
        ({"Authorization": "Bearer open"}, 200),
        ({"Authorization": "Bearer root"}, 200),
    ],
)
async def test_keys(serve: Serve, png: bytes, headers: dict[str, str], status: int) -> None:
    async with serve(security=KEYS) as client:
        for method, path in [
            ("POST", "/v1/predict"),
            ("POST", "/v1/explain"),
            ("POST", "/v1/features"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/efficientnet_lite0"),
            ("GET", "/v1/models/efficientnet_lite0/labels"),
            ("GET", "/v1/models/efficientnet_lite0/layers"),
            ("GET", "/v1/methods"),
        ]:
            response = await client.request(method, path, content=png, headers=headers)
            assert response.status_code == status, path
            if status == 401:
                assert response.json()["code"] == "unauthorized"
                assert response.headers["www-authenticate"] == "Bearer"


async def test_health_and_metrics_need_no_key(serve: Serve) -> None:
    async with serve(security=KEYS) as client:
        for path in ("/", "/livez", "/readyz", "/healthz", "/metrics", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200, path


async def test_cors(serve: Serve, png: bytes) -> None:
    origin = {"Origin": "https://app.example"}
    asked = {**origin, "Access-Control-Request-Method": "POST"}
    async with serve(security={"cors_origins": ["https://app.example"]}) as client:
        preflight = await client.options("/v1/predict", headers=asked)
        response = await client.post("/v1/predict", content=png, headers=origin)
        other = await client.post(
            "/v1/predict", content=png, headers={"Origin": "https://evil.example"}
        )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert preflight.headers["x-request-id"]
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert "X-Request-ID" in response.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in other.headers


# ---------------------------------------------------------------- ids, timings, logs


@pytest.mark.parametrize("inbound", ["abc-123", "01JZ8Q4M7V9WK3T5R2XN6B1C0D", "a" * 128])
async def test_sane_request_ids_are_kept(client: httpx.AsyncClient, inbound: str) -> None:
    response = await client.get("/v1/models", headers={"X-Request-ID": inbound})
    assert response.headers["x-request-id"] == inbound


@pytest.mark.parametrize("inbound", ["", "a b", "a\tb", "é", "<script>", "a" * 129])
async def test_strange_request_ids_are_replaced(client: httpx.AsyncClient, inbound: str) -> None:
    headers = {"X-Request-ID": inbound.encode()}
    response = await client.get("/v1/nope", headers=headers)
    assert response.headers["x-request-id"] != inbound
    assert len(response.headers["x-request-id"]) == 26
    assert response.json()["request_id"] == response.headers["x-request-id"]


async def test_server_timing(client: httpx.AsyncClient, png: bytes) -> None:
    response = await client.post("/v1/predict", content=png)
    stages = dict(item.split(";dur=") for item in response.headers["server-timing"].split(", "))
    assert list(stages) == ["decode", "queue", "device", "render", "total"]
    timings = response.json()["timings_ms"]
    assert float(stages["decode"]) == timings["decode"]
    assert float(stages["total"]) >= timings["total"] > 0


async def test_access_log(serve: Serve, png: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setFormatter(JsonFormatter())
    async with serve(security={"api_keys": ["open sesame"]}) as client:
        headers = {"Authorization": "Bearer open sesame", "X-Request-ID": "r-1"}
        with caplog.at_level(logging.INFO, logger="heatlens.access"):
            await client.post(
                "/v1/predict", content=png, headers=headers, params={"model": "efficientnet_lite0"}
            )
            await client.get("/v1/models/x", headers={"X-API-Key": "wrong key"})
            await client.get("/livez")
    first, second = (json.loads(line) for line in caplog.text.splitlines())
    assert first["level"] == "info"
    assert first["request_id"] == "r-1"
    assert (first["method"], first["path"], first["route"]) == (
        "POST",
        "/v1/predict",
        "/v1/predict",
    )
    assert (first["status"], first["model"], first["images"]) == (200, "efficientnet_lite0", 1)
    assert first["batch_size"] == 4
    assert first["timings_ms"]["device"] == 2.0
    assert first["duration_ms"] > 0
    assert (second["status"], second["code"]) == (401, "unauthorized")
    assert second["route"] == "/v1/models/{name}"
    assert "sesame" not in caplog.text
    assert "wrong key" not in caplog.text


def test_logs_are_json_lines() -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    stream = io.StringIO()
    try:
        configure_logging("warning", stream=stream)
        logger = logging.getLogger("some.logger")
        logger.info("not this")
        try:
            raise ValueError("inside")
        except ValueError:
            logger.exception("It %s\nbroke.", "really")
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert (event["level"], event["logger"]) == ("error", "some.logger")
    assert event["message"] == "It really\nbroke."
    assert "ValueError: inside" in event["exception"]
    assert event["time"].endswith("+00:00")
    assert "request_id" not in event


async def test_aliases_answer_as_their_routes_do(serve: Serve) -> None:
    aliases = {"/health": "/readyz", "/mine": "/v1/models"}
    server = {"aliases": aliases}
    async with serve(server=server, security={"api_keys": ["key"]}) as client:
        assert (await client.get("/health")).json() == (await client.get("/readyz")).json()
        assert (await client.get("/mine")).status_code == 401, "an alias is no way around keys"
        keyed = await client.get("/mine", headers={"X-API-Key": "key"})
        assert keyed.json()["default"]
        assert 'route="/v1/models"' in (await client.get("/metrics")).text


def test_warnings_of_libraries_are_lines_of_json() -> None:
    """A TIFF of 1 MB made Pillow warn forty thousand times, in plain text."""
    code = (
        "import warnings; from service.logs import configure_logging; configure_logging('info');"
        "[warnings.warn('corrupt data') for _ in range(1000)]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert len(lines) == 1
    assert "corrupt data" in lines[0]["message"]
