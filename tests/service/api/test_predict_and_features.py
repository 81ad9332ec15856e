"""`POST /v1/predict` and `POST /v1/features` against the contract."""

from __future__ import annotations

import base64
import io

import httpx
import pytest
from PIL import Image

from tests.fakes import LABELS, LAYERS, FakePool

pytestmark = pytest.mark.anyio


async def test_predict(client: httpx.AsyncClient, pool: FakePool, png: bytes) -> None:
    response = await client.post("/v1/predict", content=png)
    body = response.json()
    assert list(body) == ["request_id", "model", "results", "timings_ms", "batch_size"]
    (result,) = body["results"]
    assert list(result) == ["image", "predictions", "statistics"]
    assert result["statistics"] == []
    assert len(result["predictions"]) == 5
    assert set(result["predictions"][0]) == {"class_id", "label", "score", "probability"}
    probabilities = [p["probability"] for p in result["predictions"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    (job,) = pool.submitted
    assert job.operation == "predict"
    assert job.options.targets == job.options.methods == job.options.layers == ()


async def test_predict_with_statistics(client: httpx.AsyncClient, png: bytes) -> None:
    params = {"statistics": "true", "top_k": 2}
    response = await client.post("/v1/predict", content=png, params=params)
    (result,) = response.json()["results"]
    assert [s["layer"] for s in result["statistics"]] == [LAYERS[-1]]
    assert len(result["predictions"]) == 2


async def test_top_k_is_clipped_to_the_classes(client: httpx.AsyncClient, png: bytes) -> None:
    response = await client.post("/v1/predict", content=png, params={"top_k": 100})
    assert len(response.json()["results"][0]["predictions"]) == len(LABELS)


async def test_features(client: httpx.AsyncClient, pool: FakePool, png: bytes) -> None:
    response = await client.post("/v1/features", content=png)
    (result,) = response.json()["results"]
    assert list(result) == ["image", "predictions", "features"]
    assert [s["layer"] for s in result["features"]] == list(LAYERS)
    assert "grid" not in result["features"][0]
    assert "target" not in result["features"][0]
    assert set(result["features"][0]) == {
        "layer",
        "kind",
        "shape",
        "mean",
        "std",
        "min",
        "max",
        "l2",
        "sparsity",
        "dead_channels",
        "quantiles",
        "top_channels",
    }
    assert pool.submitted[0].options.channels == 16


async def test_features_of_gradients_name_their_class(
    client: httpx.AsyncClient, png: bytes
) -> None:
    params = {"kinds": "output,grad_output", "targets": "3,1", "layers": "stem", "channels": 2}
    response = await client.post("/v1/features", content=png, params=params)
    features = response.json()["results"][0]["features"]
    assert [(f["kind"], f.get("target")) for f in features] == [
        ("output", None),
        ("grad_output", 3),
        ("grad_output", 1),
    ]
    assert len(features[0]["top_channels"]) == 2


async def test_layers_without_a_map_can_be_described(client: httpx.AsyncClient, png: bytes) -> None:
    response = await client.post("/v1/features", content=png, params={"layers": "pool"})
    assert [f["layer"] for f in response.json()["results"][0]["features"]] == ["pool"]


async def test_grid(client: httpx.AsyncClient, png: bytes) -> None:
    params = {"grid": "true", "channels": 4, "layers": "stem"}
    response = await client.post("/v1/features", content=png, params=params)
    grid = response.json()["results"][0]["features"][0]["grid"]
    image = Image.open(io.BytesIO(base64.b64decode(grid["data"])))
    assert (image.format, grid["media_type"]) == ("PNG", "image/png")
    assert image.size == (grid["width"], grid["height"])
