"""`POST /v1/explain` against the contract, field by field."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
from PIL import Image

from models.imaging.colormaps import COLORMAPS
from models.imaging.decode import DecodeLimits, decode
from models.imaging.preprocess import preprocess
from models.methods import METHODS
from models.types import Preprocess
from service.devices.socket_pool import digest_of
from tests.fakes import LABELS, LAYERS, FakePool, fake_map, fake_scores

pytestmark = pytest.mark.anyio

Draw = Callable[..., bytes]


def decoded(encoded: dict[str, Any]) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(encoded["data"])))
    assert Image.MIME[image.format] == encoded["media_type"]
    assert image.size == (encoded["width"], encoded["height"])
    return image


def model_input(data: bytes) -> np.ndarray:
    """The part of an image that the fake model sees."""
    spec = Preprocess(resize=36, crop=(32, 32))
    return preprocess(decode(data, limits=DecodeLimits(), preprocess=spec), spec)[0]


async def explain(client: httpx.AsyncClient, png: bytes, **options: Any) -> dict[str, Any]:
    response = await client.post("/v1/explain", content=png, params=options)
    assert response.status_code == 200, response.text
    return response.json()


async def test_answer_field_by_field(client: httpx.AsyncClient, png: bytes) -> None:
    response = await client.post("/v1/explain", content=png, headers={"X-Request-ID": "mine-1"})
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["request_id", "model", "results", "timings_ms", "batch_size"]
    assert body["request_id"] == response.headers["x-request-id"] == "mine-1"
    assert body["model"] == {
        "name": "efficientnet_lite0",
        "version": "1",
        "device": "cpu",
        "precision": "fp32",
    }
    assert list(body["timings_ms"]) == ["decode", "queue", "device", "render", "total"]
    assert body["timings_ms"]["queue"] == 0.5
    assert body["timings_ms"]["device"] == 2.0
    assert body["timings_ms"]["total"] > body["timings_ms"]["decode"] > 0
    assert body["batch_size"] == 4
    (result,) = body["results"]
    assert list(result) == ["image", "predictions", "explanations", "statistics"]
    assert result["image"]["width"] == 80
    assert result["image"]["height"] == 60
    assert result["image"]["region"] == pytest.approx(
        {"x": 40 / 3, "y": 10 / 3, "width": 160 / 3, "height": 160 / 3}
    )
    (explanation,) = result["explanations"]
    assert list(explanation) == [
        "method",
        "layer",
        "target",
        "heatmap",
        "overlay",
        "range",
        "signed",
        "degenerate",
        "peak",
        "box",
        "faithfulness",
        "warnings",
    ]
    assert explanation["method"] == "gradcam"
    assert explanation["layer"] == LAYERS[-1]
    assert explanation["signed"] is False
    assert explanation["degenerate"] is False
    assert explanation["faithfulness"] == {}
    assert explanation["warnings"] == []
    (statistics,) = result["statistics"]
    assert statistics["layer"] == LAYERS[-1]
    assert statistics["kind"] == "output"
    assert statistics["shape"] == [8, 7, 7]
    assert list(statistics["quantiles"]) == ["p01", "p25", "p50", "p75", "p99"]
    assert list(statistics["top_channels"][0]) == ["index", "mean", "max", "weight"]


async def test_numbers_are_the_pools_own(client: httpx.AsyncClient, png: bytes) -> None:
    body = await explain(client, png, outputs="values", top_k=3, targets="top2")
    (result,) = body["results"]
    seen = model_input(png)
    ranked = sorted(fake_scores(seen, len(LABELS)), key=lambda score: -score.score)
    assert [p["class_id"] for p in result["predictions"]] == [s.class_id for s in ranked[:3]]
    assert [p["label"] for p in result["predictions"]] == [LABELS[s.class_id] for s in ranked[:3]]
    assert result["predictions"][0]["score"] == pytest.approx(ranked[0].score)
    assert result["predictions"][0]["probability"] == pytest.approx(ranked[0].probability)
    (explanation,) = result["explanations"]
    assert explanation["target"] == result["predictions"][1]
    values = explanation["values"]
    assert (values["shape"], values["dtype"]) == ([7, 7], "float32")
    decoded = np.frombuffer(base64.b64decode(values["data"]), "<f4").reshape(7, 7)
    expected = fake_map(seen) * (1 + ranked[1].class_id)
    np.testing.assert_array_equal(decoded, expected)
    assert explanation["range"] == pytest.approx(
        {"min": float(expected.min()), "max": float(expected.max())}
    )


async def test_drawn_images(client: httpx.AsyncClient, png: bytes) -> None:
    (explanation,) = (await explain(client, png))["results"][0]["explanations"]
    heatmap, overlay = decoded(explanation["heatmap"]), decoded(explanation["overlay"])
    assert (heatmap.format, heatmap.mode, heatmap.size) == ("PNG", "P", (32, 32))
    assert "transparency" in heatmap.info
    assert (overlay.format, overlay.size) == ("JPEG", (32, 32))


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
async def test_overlay_formats(client: httpx.AsyncClient, png: bytes, image_format: str) -> None:
    body = await explain(client, png, overlay_format=image_format, outputs="overlay")
    (explanation,) = body["results"][0]["explanations"]
    assert "heatmap" not in explanation
    assert decoded(explanation["overlay"]).format == image_format.upper()


@pytest.mark.parametrize("colormap", COLORMAPS)
async def test_colormaps(client: httpx.AsyncClient, png: bytes, colormap: str) -> None:
    body = await explain(client, png, colormap=colormap, outputs="heatmap")
    heatmap = decoded(body["results"][0]["explanations"][0]["heatmap"])
    palette = np.frombuffer(bytes(heatmap.palette.palette), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(palette, COLORMAPS[colormap])


@pytest.mark.parametrize(
    ("method", "colormap"), [("gradcam", "turbo"), ("saliency", "turbo"), ("lrp", "coolwarm")]
)
async def test_the_default_colours_suit_the_map(
    client: httpx.AsyncClient, png: bytes, method: str, colormap: str
) -> None:
    for options in ({}, {"colormap": "auto"}):
        body = await explain(client, png, methods=method, outputs="heatmap", **options)
        heatmap = decoded(body["results"][0]["explanations"][0]["heatmap"])
        palette = np.frombuffer(bytes(heatmap.palette.palette), np.uint8).reshape(-1, 3)
        np.testing.assert_array_equal(palette, COLORMAPS[colormap])


async def test_clip_saturates_the_picture_and_not_the_values(
    client: httpx.AsyncClient, png: bytes
) -> None:
    found = {}
    for clip in ("0", "0.1", "auto"):
        body = await explain(client, png, clip=clip, outputs="heatmap,values")
        found[clip] = body["results"][0]["explanations"][0]
    levels = {clip: np.asarray(decoded(item["heatmap"])) for clip, item in found.items()}
    assert (levels["0.1"] == 255).mean() == pytest.approx(0.1, abs=0.02)
    assert (levels["0"] == 255).mean() < 0.05
    np.testing.assert_array_equal(levels["auto"], levels["0"])
    assert len({item["values"]["data"] for item in found.values()}) == 1
    assert len({str(item["range"]) for item in found.values()}) == 1


async def test_alpha(client: httpx.AsyncClient, png: bytes) -> None:
    body = await explain(client, png, alpha=0, overlay_format="png")
    overlay = decoded(body["results"][0]["explanations"][0]["overlay"])
    np.testing.assert_array_equal(np.asarray(overlay.convert("RGB")), model_input(png))


async def test_original_canvas(client: httpx.AsyncClient, draw: Draw) -> None:
    body = await explain(client, draw(size=(2000, 1500)), canvas="original")
    (explanation,) = body["results"][0]["explanations"]
    assert decoded(explanation["heatmap"]).size == (1024, 768)
    assert decoded(explanation["overlay"]).size == (1024, 768)
    assert body["results"][0]["image"]["width"] == 2000


async def test_peak_and_box_lie_in_the_image(client: httpx.AsyncClient, png: bytes) -> None:
    (result,) = (await explain(client, png))["results"]
    region = result["image"]["region"]
    (explanation,) = result["explanations"]
    peak, box = explanation["peak"], explanation["box"]
    assert region["x"] <= peak["x"] <= region["x"] + region["width"]
    assert region["y"] <= peak["y"] <= region["y"] + region["height"]
    assert box["x"] <= peak["x"] <= box["x"] + box["width"]
    assert all(isinstance(value, int) for value in box.values())


async def test_order_is_method_target_layer(client: httpx.AsyncClient, png: bytes) -> None:
    body = await explain(
        client, png, methods="layercam,gradcam", targets="top2,0", layers="stem,body"
    )
    found = [
        (e["method"], e["target"]["class_id"], e["layer"])
        for e in body["results"][0]["explanations"]
    ]
    second = body["results"][0]["predictions"][1]["class_id"]
    assert found == [
        (method, target, layer)
        for method in ("layercam", "gradcam")
        for target in (second, 0)
        for layer in ("stem", "body")
    ]


async def test_fused_layers_are_one(client: httpx.AsyncClient, png: bytes) -> None:
    body = await explain(client, png, layers="stem,body", fuse="mean")
    assert [e["layer"] for e in body["results"][0]["explanations"]] == ["stem+body"]


async def test_options_reach_the_job(client: httpx.AsyncClient, pool: FakePool, b64: str) -> None:
    response = await client.post(
        "/v1/explain",
        json={
            "images": [{"b64": b64}],
            "methods": ["hirescam"],
            "targets": [{"class": "tabby", "against": [1, "top2"]}],
            "layers": ["b*"],
            "top_k": 99,
            "statistics": False,
            "faithfulness": ["deletion"],
            "interventions": [{"layer": "stem", "channels": [3, 5], "op": "scale", "value": 0.5}],
            "samples": 7,
            "steps": 8,
            "seed": 9,
        },
    )
    assert response.status_code == 200, response.text
    (job,) = pool.submitted
    options = job.options
    assert (job.operation, job.model, job.version) == ("explain", "efficientnet_lite0", "1")
    assert job.input.shape == (32, 32, 3)
    assert job.input.dtype == np.uint8
    assert options.methods == ("hirescam",)
    assert options.layers == ("body",)
    assert options.top_k == len(LABELS)
    assert options.statistics is False
    target = options.targets[0]
    assert (target.cls.kind, target.cls.value) == ("index", 0)
    assert [(ref.kind, ref.value) for ref in target.against] == [("index", 1), ("rank", 2)]
    change = options.interventions[0]
    assert (change.layer, change.channels, change.op, change.value) == (
        "stem",
        (3, 5),
        "scale",
        0.5,
    )
    assert (options.samples, options.steps, options.seed) == (7, 8, 9)
    body = response.json()["results"][0]
    assert body["explanations"][0]["faithfulness"] == {"deletion": {"value": 0.1, "random": 0.3}}

    assert body["statistics"] == []


async def test_degenerate_map(client: httpx.AsyncClient) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(buffer, "PNG")
    body = await explain(client, buffer.getvalue(), overlay_format="png")
    (explanation,) = body["results"][0]["explanations"]
    assert explanation["degenerate"] is True
    assert explanation["peak"] is None
    assert explanation["box"] is None
    assert explanation["range"] == {"min": 0.0, "max": 0.0}
    heatmap = np.asarray(decoded(explanation["heatmap"]).convert("RGBA"))
    assert not heatmap[..., 3].any()
    overlay = np.asarray(decoded(explanation["overlay"]).convert("RGB"))
    assert (overlay == 128).all()


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_is_accepted(client: httpx.AsyncClient, png: bytes, method: str) -> None:
    body = await explain(client, png, methods=method, outputs="heatmap")
    assert body["results"][0]["explanations"][0]["signed"] is METHODS[method].signed


async def test_curves_come_when_asked_for(client: httpx.AsyncClient, png: bytes) -> None:
    body = await explain(client, png, faithfulness="deletion", curves=True)
    measured = body["results"][0]["explanations"][0]["faithfulness"]["deletion"]
    assert measured["curve"] == {
        "share": [0.0, 0.5, 1.0],
        "value": [0.6, 0.1, 0.0],
        "random": [0.6, 0.4, 0.0],
    }


# ---------------------------------------------------------------- several images


async def test_32_images_keep_their_order(
    client: httpx.AsyncClient, draw: Draw, pool: FakePool
) -> None:
    files = [("image", (f"{i}.png", draw(i), "image/png")) for i in range(32)]
    response = await client.post("/v1/explain", files=files, params={"outputs": "values"})
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert len(results) == 32
    assert len({job.id for job in pool.submitted}) == 32
    assert len({digest_of(job) for job in pool.submitted}) == 32
    for i, result in enumerate(results):
        scores = fake_scores(model_input(draw(i)), len(LABELS))
        best = max(scores, key=lambda score: score.score)
        assert result["predictions"][0]["class_id"] == best.class_id
        assert result["predictions"][0]["score"] == pytest.approx(best.score)


async def test_one_bad_image_does_not_spoil_the_others(
    client: httpx.AsyncClient, png: bytes
) -> None:
    files = [
        ("image", ("a.png", png)),
        ("image", ("b.png", png[:200])),
        ("image", ("c.txt", b"not an image")),
        ("image", ("d.png", b"")),
        ("image", ("e.png", png)),
    ]
    response = await client.post("/v1/explain", files=files)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [list(result) == ["error"] for result in results] == [False, True, True, True, False]
    assert [results[i]["error"]["code"] for i in (1, 2, 3)] == [
        "image_undecodable",
        "unsupported_media_type",
        "unsupported_media_type",
    ]
    assert all(set(results[i]["error"]) == {"code", "error"} for i in (1, 2, 3))


async def test_all_bad_images_fail_the_request(client: httpx.AsyncClient, png: bytes) -> None:
    files = [("image", ("b.png", png[:200])), ("image", ("c.txt", b"not an image"))]
    response = await client.post("/v1/explain", files=files)
    assert response.status_code == 422
    assert response.json()["code"] == "image_undecodable"


async def test_targets_of_an_image_override_the_common_ones(
    client: httpx.AsyncClient, b64: str
) -> None:
    images = [{"b64": b64}, {"b64": b64, "targets": ["goldfish", 4]}]
    response = await client.post("/v1/explain", json={"images": images, "targets": [2]})
    explained = [
        [e["target"]["class_id"] for e in result["explanations"]]
        for result in response.json()["results"]
    ]
    assert explained == [[2], [3, 4]]


# ---------------------------------------------------------------- Accept: image/*


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("image/png", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("image/webp", "image/webp"),
        ("image/*", "image/jpeg"),
        ("application/json;q=0.5, image/png", "image/png"),
        ("image/avif, image/webp;q=0.9, image/png;q=0.8, */*;q=0.1", "image/webp"),
    ],
)
async def test_response_as_an_image(
    client: httpx.AsyncClient, png: bytes, accept: str, media_type: str
) -> None:
    response = await client.post("/v1/explain", content=png, headers={"Accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    image = Image.open(io.BytesIO(response.content))
    assert (Image.MIME[image.format], image.size) == (media_type, (32, 32))
    body = await explain(client, png, overlay_format=media_type.removeprefix("image/"))
    best = body["results"][0]["predictions"][0]
    assert response.headers["x-class-id"] == str(best["class_id"])
    assert unquote(response.headers["x-label"]) == best["label"]
    assert float(response.headers["x-probability"]) == pytest.approx(best["probability"], abs=1e-6)
    assert response.headers["x-request-id"]
    data = body["results"][0]["explanations"][0]["overlay"]["data"]
    assert response.content == base64.b64decode(data)


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "application/json, image/png;q=0.9", "image/avif", "x"]
)
async def test_response_as_json(client: httpx.AsyncClient, png: bytes, accept: str) -> None:
    response = await client.post("/v1/explain", content=png, headers={"Accept": accept})
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"methods": "gradcam,layercam"}, "methods"),
        ({"targets": "0,1"}, "targets"),
        ({"layers": "stem,body"}, "layers"),
    ],
)
async def test_an_image_shows_one_explanation(
    client: httpx.AsyncClient, png: bytes, options: dict[str, str], field: str
) -> None:
    headers = {"Accept": "image/png"}
    response = await client.post("/v1/explain", content=png, headers=headers, params=options)
    assert (response.status_code, response.json()["field"]) == (422, field)
    files = [("image", png), ("image", png)]
    response = await client.post("/v1/explain", files=files, headers=headers)
    assert (response.status_code, response.json()["field"]) == (422, "images")


async def test_an_image_of_fused_layers(client: httpx.AsyncClient, png: bytes) -> None:
    params = {"layers": "stem,body", "fuse": "max"}
    response = await client.post(
        "/v1/explain", content=png, headers={"Accept": "image/png"}, params=params
    )
    assert response.headers["content-type"] == "image/png"
