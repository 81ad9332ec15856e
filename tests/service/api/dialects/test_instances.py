"""KServe v1 (and Vertex AI), TorchServe and SageMaker: their habits in, their shapes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api.app import create_app
from service.devices.pool import DeviceStatus
from service.settings import Settings
from tests.fakes import LABELS, FakePool, fake_info

pytestmark = pytest.mark.anyio

NAME = "efficientnet_lite0"
V1 = f"/v1/models/{NAME}"


async def native(client: httpx.AsyncClient, path: str, b64: str, **options: Any) -> dict[str, Any]:
    response = await client.post(f"/v1/{path}", json={"images": [{"b64": b64}], **options})
    return response.json()["results"][0]


# ---------------------------------------------------------------- KServe v1

HABITS: dict[str, Callable[[str], Any]] = {
    "text": lambda b64: b64,
    "b64": lambda b64: {"b64": b64},
    "data": lambda b64: {"data": b64},
    "data.b64": lambda b64: {"data": {"b64": b64}},
    "image": lambda b64: {"image": b64},
    "image.b64": lambda b64: {"image": {"b64": b64}},
    "image_bytes": lambda b64: {"image_bytes": {"b64": b64}, "key": "1"},
    "body": lambda b64: {"body": b64},
    "data URL": lambda b64: {"image": {"b64": f"data:image/png;base64,{b64}"}},
}


@pytest.mark.parametrize("name", HABITS)
async def test_every_habit_of_an_instance(client: httpx.AsyncClient, b64: str, name: str) -> None:
    document = {"instances": [HABITS[name](b64)] * 2, "signature_name": "serving_default"}
    response = await client.post(f"{V1}:predict", json=document)
    assert response.json() == {"predictions": [await native(client, "predict", b64)] * 2}
    response = await client.post(f"{V1}:explain", json=document)
    assert response.json() == {"explanations": [await native(client, "explain", b64)] * 2}
    assert response.headers["content-type"] == "application/json"


async def test_targets_and_parameters(client: httpx.AsyncClient, b64: str) -> None:
    options = {"methods": ["layercam"], "outputs": ["values"]}
    instances = [{"b64": b64, "target": 2}, {"b64": b64, "target": "goldfish"}, {"b64": b64}]
    document = {"instances": instances, "parameters": {**options, "targets": ["top2"]}}
    found = (await client.post(f"{V1}:explain", json=document)).json()["explanations"]
    for result, target in zip(found, (2, "goldfish", "top2"), strict=True):
        assert result == await native(client, "explain", b64, targets=[target], **options)
    query = await client.post(
        f"{V1}:explain", json={"instances": [b64]}, params={"methods": "layercam,gradcam"}
    )
    (result,) = query.json()["explanations"]
    assert [e["method"] for e in result["explanations"]] == ["layercam", "gradcam"]


async def test_vertex_asks_for_explanations_by_a_parameter(
    client: httpx.AsyncClient, b64: str
) -> None:
    """Its one route is an alias of `:predict`."""
    parameters = {"explain": True, "methods": ["layercam"]}
    response = await client.post(
        f"{V1}:predict", json={"instances": [{"b64": b64}], "parameters": parameters}
    )
    expected = await native(client, "explain", b64, methods=["layercam"])
    assert response.json() == {"predictions": [expected]}


async def test_one_bad_instance_of_several(client: httpx.AsyncClient, b64: str) -> None:
    response = await client.post(f"{V1}:predict", json={"instances": ["AAAA", b64]})
    bad, good = response.json()["predictions"]
    assert bad["error"]["code"] == "unsupported_media_type"
    assert good["predictions"]


@pytest.mark.parametrize(
    ("document", "status", "code", "field"),
    [
        ({}, 422, "invalid_option", "instances"),
        ({"instances": []}, 422, "invalid_option", "instances"),
        ({"instances": "AAAA"}, 422, "invalid_option", "instances"),
        ({"instances": [7]}, 422, "invalid_option", "instances.0"),
        ({"instances": [[0.5]]}, 422, "invalid_option", "instances.0"),
        ({"instances": [{}]}, 422, "invalid_option", "instances.0"),
        ({"instances": [{"image": 7}]}, 422, "invalid_option", "instances.0.b64"),
        ({"instances": [{"image": {"b64": None}}]}, 422, "invalid_option", "instances.0"),
        ({"instances": ["?"]}, 422, "image_undecodable", "instances.0.b64"),
        ({"instances": ["AAAA"] * 33}, 413, "too_many_images", None),
        ({"instances": [{"url": "http://x/"}]}, 403, "url_input_disabled", "instances.0.url"),
        ({"instances": ["AAAA"], "parameters": [1]}, 422, "invalid_option", "parameters"),
        ({"instances": ["AAAA"], "parameters": {"x": 1}}, 422, "invalid_option", "x"),
        ({"instances": ["AAAA"], "parameters": {"methods": 7}}, 422, "invalid_option", "methods"),
    ],
)
async def test_bad_instances(
    client: httpx.AsyncClient, document: Any, status: int, code: str, field: str | None
) -> None:
    response = await client.post(f"{V1}:explain", json=document)
    found = response.json()
    assert (response.status_code, found["code"], found.get("field")) == (status, code, field)
    assert isinstance(found["error"], str)


async def test_unknown_names(client: httpx.AsyncClient, b64: str) -> None:
    for path in ("/v1/models/nope:predict", f"{V1}@9:explain"):
        response = await client.post(path, json={"instances": [b64]})
        assert (response.status_code, response.json()["code"]) == (404, "unknown_model")
    response = await client.post(f"{V1}:guess", json={"instances": [b64]})
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")


# ---------------------------------------------------------------- TorchServe


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("version", ["", "/1"])
async def test_torchserve_predictions(
    client: httpx.AsyncClient, png: bytes, b64: str, method: str, version: str
) -> None:
    expected = {
        item["label"]: item["probability"]
        for item in (await native(client, "predict", b64))["predictions"]
    }
    bodies: list[dict[str, Any]] = [
        {"content": png},
        {"content": png, "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        {"files": {"data": png}},
        {"json": {"instances": [{"data": b64}]}},
    ]
    for body in bodies:
        response = await client.request(method, f"/predictions/{NAME}{version}", **body)
        assert list(response.json().items()) == list(expected.items())
    several = [("data", png), ("data", png)]
    response = await client.request(method, f"/predictions/{NAME}{version}", files=several)
    assert response.json() == [expected] * 2


async def test_torchserve_explanations(client: httpx.AsyncClient, png: bytes, b64: str) -> None:
    query = {"methods": "layercam", "targets": "2"}
    response = await client.post(f"/explanations/{NAME}/1", content=png, params=query)
    expected = await native(client, "explain", b64, methods=["layercam"], targets=[2])
    assert response.json() == expected


async def test_torchserve_labels_that_occur_twice(png: bytes) -> None:
    """ImageNet has two classes called crane; the better one counts."""
    labels = ["crane"] * len(LABELS)
    app = create_app(Settings(), FakePool([fake_info(labels=labels)]))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://testserver"
        ) as client,
    ):
        found = (await client.post(f"/predictions/{NAME}", content=png)).json()
        best = (await client.post("/v1/predict", content=png)).json()["results"][0]["predictions"][
            0
        ]
    assert found == {"crane": best["probability"]}


@pytest.mark.parametrize(
    ("path", "content", "status", "kind"),
    [
        ("/predictions/nope", b"", 400, "malformed_body"),
        ("/predictions/nope", b"x", 415, "unsupported_media_type"),
        (f"/explanations/{NAME}?methods=x", None, 422, "invalid_option"),
        (f"/predictions/{NAME}/7", None, 404, "unknown_model"),
    ],
)
async def test_torchserve_errors(
    client: httpx.AsyncClient, png: bytes, path: str, content: bytes | None, status: int, kind: str
) -> None:
    response = await client.post(path, content=png if content is None else content)
    assert response.status_code == status
    found = response.json()
    assert found.keys() == {"code", "type", "message"}
    assert (found["code"], found["type"]) == (status, kind)
    assert found["message"]
    assert response.headers["content-type"] == "application/json"


async def test_torchserve_errors_before_the_route(serve: Callable[..., Any], png: bytes) -> None:
    async with serve(security={"api_keys": ["k"]}) as client:
        response = await client.post(f"/predictions/{NAME}", content=png)
        assert response.json()["code"] == 401
        assert response.headers["www-authenticate"] == "Bearer"
        metrics = (await client.get("/metrics")).text
        assert 'heatlens_rejected_total{reason="unauthorized"} 1.0' in metrics


async def test_ping(client: httpx.AsyncClient, pool: FakePool) -> None:
    response = await client.get("/ping")
    assert (response.status_code, response.json()) == (200, {"status": "Healthy"})
    pool.statuses = [DeviceStatus(device="cpu", state="lost")]
    response = await client.get("/ping")
    assert (response.status_code, response.json()) == (500, {"status": "Unhealthy"})


# ---------------------------------------------------------------- SageMaker


async def test_sagemaker(client: httpx.AsyncClient, pool: FakePool, png: bytes, b64: str) -> None:
    expected = await native(client, "predict", b64)
    bodies: list[dict[str, Any]] = [
        {"content": png, "headers": {"Content-Type": "application/x-image"}},
        {"content": png, "headers": {"Content-Type": "image/png"}},
        {"json": {"images": [{"b64": b64}]}},
        {"json": {"instances": [b64]}},
    ]
    for body in bodies:
        response = await client.post("/invocations", **body)
        assert response.json()["results"] == [expected]
    headers = {
        "X-Amzn-SageMaker-Custom-Attributes": "explain=true&methods=layercam,gradcam&targets=2",
        "X-Amzn-SageMaker-Target-Model": f"{NAME}@1",
    }
    response = await client.post("/invocations", content=png, headers=headers)
    options = {"methods": ["layercam", "gradcam"], "targets": [2]}
    assert response.json()["results"] == [await native(client, "explain", b64, **options)]
    headers = {"X-Amzn-SageMaker-Target-Model": "nope"}
    response = await client.post("/invocations", content=png, headers=headers)
    assert response.json()["code"] == "unknown_model"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)
HELD = st.dictionaries(st.sampled_from(["b64", "image", "data", "target", "targets", "key"]), JSON)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(
        [
            f"{V1}:predict",
            f"{V1}:explain",
            f"/predictions/{NAME}",
            f"/explanations/{NAME}",
            "/invocations",
        ]
    ),
    document=st.fixed_dictionaries(
        {"instances": st.lists(HELD | JSON, max_size=3) | JSON},
        optional={
            "parameters": st.dictionaries(st.sampled_from(["explain", "top_k"]), JSON) | JSON
        },
    ),
    attributes=st.text(alphabet="explain=tru&methods,;% ", max_size=30),
)
async def test_no_request_is_a_fault(path: str, document: Any, attributes: str) -> None:
    app = create_app(Settings(), FakePool())
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://testserver"
        ) as client,
    ):
        response = await client.post(
            path,
            content=json.dumps(document).encode(),
            headers={
                "Content-Type": "application/json",
                "X-Amzn-SageMaker-Custom-Attributes": attributes,
            },
        )
    assert response.status_code < 500, response.text
