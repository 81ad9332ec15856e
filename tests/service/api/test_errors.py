"""Every error in its one shape: each code that a request can provoke, with its status and field."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from msgspec import structs

from models.errors import ERRORS, HeatlensError
from models.types import Job, MethodSupport
from service.api.errors import STATUS
from service.devices.pool import DeviceStatus
from tests.fakes import FakePool, fake_info

pytestmark = pytest.mark.anyio


def check(response: httpx.Response, status: int, code: str, field: str | None = None) -> str:
    """The shape that every error has; returns its text."""
    body = response.json()
    assert (response.status_code, body["code"], body.get("field")) == (status, code, field)
    assert response.headers["content-type"] == "application/json"
    assert set(body) - {"field"} == {"error", "code", "request_id", "retryable"}
    assert body["request_id"] == response.headers["x-request-id"]
    assert response.headers["server-timing"].startswith("total;dur=")
    assert body["retryable"] is ERRORS[code].retryable
    assert ("retry-after" in response.headers) is body["retryable"]
    text: str = body["error"]
    assert text.endswith(".")
    return text


def test_every_error_has_a_status() -> None:
    assert set(STATUS) == set(ERRORS)


OPTIONS: list[tuple[str, dict[str, Any], int, str, str, str]] = [
    ("explain", {"methods": "nope"}, 422, "invalid_option", "methods.0", "Allowed: cam, gradcam"),
    ("explain", {"methods": "gradcam,nope"}, 422, "invalid_option", "methods.1", "Allowed"),
    ("explain", {"methods": ""}, 422, "invalid_option", "methods", "at least 1"),
    ("explain", {"nope": "1"}, 422, "invalid_option", "nope", "Allowed: model"),
    ("predict", {"methods": "cam"}, 422, "invalid_option", "methods", "Unknown option"),
    ("explain", {"targets": "5"}, 422, "target_out_of_range", "targets.0", "0 to 4"),
    ("explain", {"targets": "0,top9"}, 422, "target_out_of_range", "targets.1", "top5"),
    ("explain", {"targets": "-1"}, 404, "unknown_label", "targets.0", "/labels"),
    ("explain", {"targets": "unicorn"}, 404, "unknown_label", "targets.0", "/labels"),
    ("explain", {"targets": ",".join("0" * 17)}, 422, "invalid_option", "targets", "at most 16"),
    ("explain", {"layers": "nope.*"}, 404, "unknown_layer", "layers.0", "/layers"),
    ("explain", {"layers": "pool"}, 404, "unknown_layer", "layers.0", "not a map of the image"),
    ("explain", {"model": "nope"}, 404, "unknown_model", "model", "efficientnet_lite0"),
    ("explain", {"model": "efficientnet_lite0@9"}, 404, "unknown_model", "model", "Known"),
    ("explain", {"alpha": "2"}, 422, "invalid_option", "alpha", "at most 1"),
    ("explain", {"alpha": "nan"}, 422, "invalid_option", "alpha", "finite"),
    ("explain", {"alpha": ["0.1", "0.2"]}, 422, "invalid_option", "alpha", "more than once"),
    ("explain", {"colormap": "pink"}, 422, "invalid_option", "colormap", "turbo, viridis"),
    ("explain", {"clip": "0.2"}, 422, "invalid_option", "clip", "from 0 to 0.1"),
    ("explain", {"clip": "nan"}, 422, "invalid_option", "clip", "from 0 to 0.1"),
    ("explain", {"clip": "much"}, 422, "invalid_option", "clip", "Must be auto, or a number"),
    ("explain", {"fuse": "sum"}, 422, "invalid_option", "fuse", "none, mean, max, product"),
    ("explain", {"outputs": "heatmap,gif"}, 422, "invalid_option", "outputs.1", "overlay"),
    ("explain", {"canvas": "big"}, 422, "invalid_option", "canvas", "input, original"),
    ("explain", {"overlay_format": "gif"}, 422, "invalid_option", "overlay_format", "jpeg"),
    ("explain", {"faithfulness": "x"}, 422, "invalid_option", "faithfulness.0", "deletion"),
    ("explain", {"samples": "0"}, 422, "invalid_option", "samples", "at least 1"),
    ("explain", {"seed": "-1"}, 422, "invalid_option", "seed", "at least 0"),
    ("explain", {"interventions": "[]"}, 422, "invalid_option", "interventions", "JSON"),
    ("predict", {"top_k": "0"}, 422, "invalid_option", "top_k", "at least 1"),
    ("predict", {"top_k": "101"}, 422, "invalid_option", "top_k", "at most 100"),
    ("predict", {"top_k": "x"}, 422, "invalid_option", "top_k", "integer"),
    ("predict", {"statistics": "perhaps"}, 422, "invalid_option", "statistics", "true or false"),
    ("predict", {"timeout_s": "0"}, 422, "invalid_option", "timeout_s", "greater than 0"),
    ("features", {"kinds": "inside"}, 422, "invalid_option", "kinds.0", "grad_output"),
    ("features", {"channels": "0"}, 422, "invalid_option", "channels", "at least 1"),
    ("features", {"layers": "nope"}, 404, "unknown_layer", "layers.0", "/layers"),
]


@pytest.mark.parametrize(("route", "options", "status", "code", "field", "text"), OPTIONS)
async def test_wrong_options(
    client: httpx.AsyncClient,
    png: bytes,
    route: str,
    options: dict[str, Any],
    status: int,
    code: str,
    field: str,
    text: str,
) -> None:
    response = await client.post(f"/v1/{route}", content=png, params=options)
    assert text in check(response, status, code, field)


JSON_OPTIONS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"targets": "top1"}, 422, "invalid_option", "targets"),
    ({"targets": [1.5]}, 422, "invalid_option", "targets.0"),
    ({"targets": [True]}, 422, "invalid_option", "targets.0"),
    ({"targets": [{"klass": 1}]}, 422, "invalid_option", "targets.0"),
    ({"targets": [{"class": 9}]}, 422, "target_out_of_range", "targets.0.class"),
    ({"targets": [{"class": 1, "against": 2}]}, 422, "invalid_option", "targets.0.against"),
    (
        {"targets": [{"class": 1, "against": [9]}]},
        422,
        "target_out_of_range",
        "targets.0.against.0",
    ),
    ({"targets": [{"class": 1, "against": [1] * 1001}]}, 422, "invalid_option", "targets"),
    ({"interventions": [{}]}, 422, "invalid_option", "interventions.0.layer"),
    (
        {"interventions": [{"layer": "stem", "channels": [1], "op": "x"}]},
        422,
        "invalid_option",
        "interventions.0.op",
    ),
    (
        {"interventions": [{"layer": "none", "channels": [1], "op": "zero"}]},
        404,
        "unknown_layer",
        "interventions.0.layer",
    ),
]


@pytest.mark.parametrize(("options", "status", "code", "field"), JSON_OPTIONS)
async def test_wrong_json_options(
    client: httpx.AsyncClient, b64: str, options: dict[str, Any], status: int, code: str, field: str
) -> None:
    response = await client.post("/v1/explain", json={"images": [{"b64": b64}], **options})
    check(response, status, code, field)


async def test_targets_of_an_image_are_blamed_by_their_path(
    client: httpx.AsyncClient, b64: str
) -> None:
    images = [{"b64": b64}, {"b64": b64, "targets": [0, 99]}]
    response = await client.post("/v1/explain", json={"images": images})
    check(response, 422, "target_out_of_range", "images.1.targets.1")


async def test_inapplicable_method(client: httpx.AsyncClient, pool: FakePool, png: bytes) -> None:
    info = pool.infos[0]
    methods = (
        MethodSupport(name="cam", applicable=False, reason="its head is not linear"),
        MethodSupport(name="gradcam", applicable=True),
    )
    pool.infos = [structs.replace(info, card=structs.replace(info.card, methods=methods))]
    response = await client.post("/v1/explain", content=png, params={"methods": "cam"})
    text = check(response, 422, "method_not_applicable", "methods.0")
    assert "Applicable: gradcam." in text


# ---------------------------------------------------------------- routes


@pytest.mark.parametrize("path", ["/nope", "/v1/nope", "/v1/predict/", "/v1//predict", "/v1"])
async def test_unknown_routes(client: httpx.AsyncClient, path: str) -> None:
    check(await client.get(path), 404, "unknown_route")


async def test_wrong_methods(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/predict")
    check(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    check(await client.request("BREW", "/livez"), 405, "method_not_allowed")


# ---------------------------------------------------------------- devices


DEVICE_CODES = [
    "overloaded",
    "not_ready",
    "draining",
    "worker_lost",
    "deadline_exceeded",
    "input_quarantined",
    "internal",
    "target_out_of_range",
]


@pytest.mark.parametrize("code", DEVICE_CODES)
async def test_errors_of_the_device(
    client: httpx.AsyncClient, pool: FakePool, png: bytes, code: str
) -> None:
    pool.fault = lambda _: ERRORS[code]("Our words.", retry_after_s=2.2)
    response = await client.post("/v1/predict", content=png)
    assert check(response, STATUS[code], code) == "Our words."
    if ERRORS[code].retryable:
        assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("seconds", [None, 0.0, 0.01])
async def test_retry_after_is_never_zero(
    client: httpx.AsyncClient, pool: FakePool, png: bytes, seconds: float | None
) -> None:
    pool.fault = lambda _: ERRORS["overloaded"]("Our words.", retry_after_s=seconds)
    response = await client.post("/v1/predict", content=png)
    assert response.headers["retry-after"] == "1"


async def test_a_device_error_of_one_image_is_its_own(
    client: httpx.AsyncClient, pool: FakePool, png: bytes
) -> None:
    def second(job: Job) -> HeatlensError | None:
        is_second = [other.id for other in pool.submitted[1:2]] == [job.id]
        return ERRORS["input_quarantined"]("Our words.") if is_second else None

    pool.fault = second
    response = await client.post("/v1/predict", files=[("image", png)] * 3)
    assert response.status_code == 200
    errors = [result.get("error") for result in response.json()["results"]]
    assert errors.count(None) == 2
    assert {"code": "input_quarantined", "error": "Our words."} in errors


@pytest.mark.parametrize("state", ["loading", "unavailable"])
async def test_a_model_that_is_not_ready(
    client: httpx.AsyncClient, pool: FakePool, png: bytes, state: str
) -> None:
    card = structs.replace(
        fake_info().card, ready=False, state=state, reason="Secret.", input=None, methods=()
    )
    pool.infos = [structs.replace(fake_info(), card=card)]
    text = check(await client.post("/v1/predict", content=png), 503, "not_ready", "model")
    assert "Secret" not in text


async def test_before_anything_is_known_of_the_models(
    client: httpx.AsyncClient, pool: FakePool, png: bytes
) -> None:
    pool.infos = []
    pool.statuses = [DeviceStatus(device="cpu", state="starting")]
    check(await client.post("/v1/predict", content=png), 503, "not_ready", "model")
    response = await client.post("/v1/predict", content=png, params={"model": "nope"})
    check(response, 404, "unknown_model", "model")


# ---------------------------------------------------------------- faults of ours


async def test_a_fault_says_nothing_but_is_logged(
    client: httpx.AsyncClient, pool: FakePool, caplog: pytest.LogCaptureFixture, png: bytes
) -> None:
    def boom(_: Job) -> HeatlensError | None:
        raise RuntimeError("secret 1234")

    pool.fault = boom
    with caplog.at_level(logging.ERROR):
        response = await client.post("/v1/predict", content=png)
    check(response, 500, "internal")
    assert "secret" not in response.text
    assert "secret 1234" in caplog.text


async def test_a_fault_in_a_route_says_nothing_but_is_logged(
    client: httpx.AsyncClient,
    pool: FakePool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def boom() -> None:
        raise RuntimeError("secret 1234")

    monkeypatch.setattr(pool, "models", boom)
    with caplog.at_level(logging.ERROR):
        response = await client.get("/v1/models")
    check(response, 500, "internal")
    assert "secret" not in response.text
    assert "secret 1234" in caplog.text


async def test_closed_pool_is_draining(
    serve: Callable[..., Any], pool: FakePool, png: bytes
) -> None:
    async with serve() as client:
        await pool.close()
        check(await client.post("/v1/predict", content=png), 503, "draining")
