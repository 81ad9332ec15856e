"""The OpenAPI document: complete, typed and true to the responses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_args

import httpx
import pytest
from jsonschema_rs import Draft202012Validator

from models.imaging.colormaps import COLORMAPS, Colormap
from models.methods import METHODS
from models.types import ModelState
from service.api.errors import STATUS
from service.devices.pool import DeviceStatus
from tests.fakes import FakePool

pytestmark = pytest.mark.anyio

OPERATIONS = ("predict", "explain", "features")


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.get("/openapi.json")).json()


def strict(schema: Any) -> Any:
    """The same schema with no property allowed that it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if "properties" in found and "type" in found:
        found.setdefault("additionalProperties", False)
    return found


def conforms(document: dict[str, Any], response: httpx.Response, path: str, method: str) -> None:
    """Assert that a response is what the document says, and nothing else."""
    documented = document["paths"][path][method]["responses"][str(response.status_code)]
    media_type = response.headers["content-type"].partition(";")[0]
    schema = documented["content"][media_type]["schema"]
    for name in documented["headers"]:
        assert name == "Retry-After" or name in response.headers
    if media_type == "application/json":
        whole = {**schema, "components": strict(document["components"])}
        Draft202012Validator(whole).validate(response.json())


async def test_responses_are_as_documented(
    client: httpx.AsyncClient, document: dict[str, Any], pool: FakePool, png: bytes
) -> None:
    images = [("image", png), ("image", b"not an image")]
    everything = {
        "explain": {
            "outputs": "heatmap,overlay,values",
            "faithfulness": "deletion,road",
            "curves": "1",
            "methods": ",".join(METHODS),
        },
        "features": {"grid": "1", "kinds": "output,grad_output"},
        "predict": {"statistics": "1"},
    }
    for name in OPERATIONS:
        path = f"/v1/{name}"
        for options in ({}, everything[name]):
            response = await client.post(path, files=images, params=options)
            assert response.status_code == 200, response.text
            conforms(document, response, path, "post")
        conforms(document, await client.post(path), path, "post")
        conforms(document, await client.post(path, content=b"x"), path, "post")
        conforms(document, await client.post(path, content=png, params={"x": 1}), path, "post")
    response = await client.post("/v1/explain", content=png, headers={"Accept": "image/webp"})
    conforms(document, response, "/v1/explain", "post")
    for path in document["paths"]:
        if "get" in document["paths"][path]:
            for model in ("efficientnet_lite0", "nope"):
                response = await client.get(path.replace("{name}", model))
                conforms(document, response, path, "get")
    pool.infos = []
    response = await client.get("/v1/models/efficientnet_lite0")
    assert response.json()["code"] == "not_ready"
    conforms(document, response, "/v1/models/{name}", "get")
    pool.statuses = [DeviceStatus(device="cpu", state="lost")]
    conforms(document, await client.get("/readyz"), "/readyz", "get")


async def test_the_check_above_can_fail(
    client: httpx.AsyncClient, document: dict[str, Any], png: bytes
) -> None:
    result = document["components"]["schemas"]["PredictResult"]["properties"]
    del result["statistics"]
    response = await client.post("/v1/predict", content=png)
    with pytest.raises(ValueError, match="statistics"):
        conforms(document, response, "/v1/predict", "post")


@pytest.mark.parametrize(
    ("name", "optional"),
    [
        ("CardResponse", {"cause"}),
        ("Method", set()),
        ("LayerInfo", set()),
        ("DeviceReadiness", set()),
        ("StatisticsResponse", {"target", "grid"}),
        ("ExplanationResponse", {"area", "heatmap", "overlay", "values"}),
        ("ErrorResponse", {"field"}),
    ],
)
async def test_fields_that_are_always_sent_are_required(
    document: dict[str, Any], name: str, optional: set[str]
) -> None:
    schema = document["components"]["schemas"][name]
    assert set(schema["required"]) == set(schema["properties"]) - optional
    assert not any("default" in field for field in schema["properties"].values())


async def test_descriptions_are_for_clients(document: dict[str, Any]) -> None:
    assert "Attributes:" not in json.dumps(document)


async def test_examples_are_valid(document: dict[str, Any]) -> None:
    found = 0
    for path in document["paths"].values():
        for operation in path.values():
            contents = [r["content"] for r in operation["responses"].values()]
            if "requestBody" in operation:
                contents.append(operation["requestBody"]["content"])
            for content in contents:
                for media in content.values():
                    if "example" in media:
                        schema = {**media["schema"], "components": strict(document["components"])}
                        Draft202012Validator(schema).validate(media["example"])
                        found += 1
    assert found > 30


async def test_every_reference_resolves(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    names = {piece.split('"')[0] for piece in text.split('"#/components/schemas/')[1:]}
    assert names
    assert names <= set(document["components"]["schemas"])
    assert "ValidationError" not in text  # FastAPI's own shape of errors


async def test_enums(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    explain = schemas["ExplainRequest"]["properties"]
    assert explain["methods"]["items"]["enum"] == list(METHODS)
    assert list(COLORMAPS) == list(get_args(Colormap))
    assert explain["colormap"]["enum"] == ["auto", *COLORMAPS]
    assert explain["clip"]["default"] == "auto"
    assert explain["fuse"]["enum"] == ["none", "mean", "max", "product"]
    assert explain["outputs"]["items"]["enum"] == ["heatmap", "overlay", "values"]
    assert sorted(schemas["CardResponse"]["properties"]["state"]["enum"]) == sorted(
        get_args(ModelState)
    )
    assert explain["interventions"]["items"] == {"$ref": "#/components/schemas/InterventionOption"}
    for name in ("top_k", "alpha", "seed", "statistics"):
        assert explain[name]["description"]


@pytest.mark.parametrize("name", OPERATIONS)
async def test_three_input_forms_are_documented(document: dict[str, Any], name: str) -> None:
    operation = document["paths"][f"/v1/{name}"]["post"]
    content = operation["requestBody"]["content"]
    assert {
        "multipart/form-data",
        "application/json",
        "image/jpeg",
        "application/octet-stream",
    } <= (set(content))
    queries = {p["name"] for p in operation["parameters"] if p["in"] == "query"}
    schema = document["components"]["schemas"][f"{name.capitalize()}Options"]
    assert queries == set(schema["properties"]) - {"interventions"}
    assert schema["additionalProperties"] is False


async def test_every_error_is_documented_where_it_can_happen(document: dict[str, Any]) -> None:
    responses = document["paths"]["/v1/explain"]["post"]["responses"]
    described = " ".join(r["description"] for r in responses.values())
    for code in set(STATUS) - {"cancelled"}:
        assert f"`{code}`" in described, code


async def test_keys_are_documented(document: dict[str, Any]) -> None:
    assert document["paths"]["/v1/models"]["get"]["security"]
    assert "security" not in document["paths"]["/readyz"]["get"]
    assert set(document["components"]["securitySchemes"]) == {"HTTPBearer", "APIKeyHeader"}


async def test_applications_have_their_own_documents(serve: Callable[..., Any]) -> None:
    async with serve() as first, serve() as second:
        assert (await first.get("/openapi.json")).json() == (
            await second.get("/openapi.json")
        ).json()
