"""Networks of other inputs than three 8-bit channels, from the request to the scores."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from service.api.app import create_app
from service.settings import Settings
from service.worker.local import LocalPool

pytestmark = pytest.mark.anyio

SIDE = 32
SOURCE = """
import torch
from torch import nn

def net(channels):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3))

def grey(): return net(1)
def colour(): return net(3)
def bands(): return net(5)
"""
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (40, 64, 3), dtype=np.uint8)
BANDS = RNG.integers(0, 10_000, (SIDE, SIDE, 5), dtype=np.uint16)
MODELS: dict[str, dict[str, Any]] = {
    "grey": {"channels": 1, "resize": [SIDE, SIDE], "mean": [0.2], "std": [0.4]},
    "colour": {
        "resize": [SIDE, SIDE],
        "order": "bgr",
        "range": [0, 255],
        "mean": [104, 117, 123],
        "std": [1],
    },
    "bands": {"channels": 5, "bits": 16, "resize": [SIDE, SIDE], "range": [0, 6.5535]},
    "letterbox": {"mode": "letterbox", "crop": SIDE, "padding": 0},
}


def file_of(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    if pixels.shape[2] == 3:
        Image.fromarray(pixels).save(file, "PNG")
    else:
        tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig")
    return file.getvalue()


def scores(channels: int, values: np.ndarray) -> np.ndarray:
    """Scores of an input (channels, H, W), by hand."""
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    network: nn.Module = scope["net"](channels).eval()
    with torch.no_grad():
        found: np.ndarray = network(torch.from_numpy(values.astype(np.float32))[None])[0].numpy()
    return found


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def client(tmp_path_factory) -> AsyncIterator[httpx.AsyncClient]:
    folder = tmp_path_factory.mktemp("net")
    (folder / "net.py").write_text(SOURCE)
    models = [
        {
            "name": name,
            "source": f"python:net.py:{'colour' if name == 'letterbox' else name}",
            "preprocess": preprocess,
        }
        for name, preprocess in MODELS.items()
    ]
    limits = {"timeout_s": 100.0, "max_wait_s": 1000.0}
    settings = Settings(models=models, base_dir=folder, server={"devices": ["cpu"]}, limits=limits)
    pool = LocalPool(settings)
    app = create_app(settings, pool)
    async with app.router.lifespan_context(app):
        await pool.wait_ready()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://testserver", timeout=100
        ) as client:
            yield client


async def explained(client: httpx.AsyncClient, model: str, pixels: np.ndarray, **params) -> Any:
    response = await client.post(
        "/v1/explain",
        params={"model": model, "targets": "0", "top_k": 3, "overlay_format": "png", **params},
        files={"image": file_of(pixels)},
    )
    assert response.status_code == 200, response.text
    return response.json()["results"][0]


def found_scores(result: Any) -> np.ndarray:
    by_class = {item["class_id"]: item["score"] for item in result["predictions"]}
    return np.array([by_class[i] for i in range(3)])


def overlay_of(result: Any) -> np.ndarray:
    data = base64.b64decode(result["explanations"][0]["overlay"]["data"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def resized(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


async def test_grey(client):
    result = await explained(client, "grey", PHOTO)
    grey = resized(Image.fromarray(PHOTO).convert("L"))[None]
    expected = scores(1, (grey / 255 - 0.2) / 0.4)
    np.testing.assert_allclose(found_scores(result), expected, atol=1e-4)
    assert overlay_of(result).shape == (SIDE, SIDE, 3)


async def test_blue_first_in_the_range_of_bytes(client):
    result = await explained(client, "colour", PHOTO)
    blue_first = resized(Image.fromarray(PHOTO))[..., ::-1].transpose(2, 0, 1)
    mean = np.array([104, 117, 123])[:, None, None]
    expected = scores(3, blue_first - mean)
    np.testing.assert_allclose(found_scores(result), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("canvas", ["input", "original"])
async def test_all_bits_of_all_bands(client, canvas):
    result = await explained(client, "bands", BANDS, canvas=canvas)
    expected = scores(5, BANDS.transpose(2, 0, 1) / 10_000)
    np.testing.assert_allclose(found_scores(result), expected, atol=1e-5)
    assert result["warnings"][0].startswith("Maps are drawn on an 8-bit RGB form")
    assert overlay_of(result).shape == (SIDE, SIDE, 3)


async def test_an_image_of_too_few_bands_is_refused(client):
    response = await client.post(
        "/v1/predict", params={"model": "bands"}, files={"image": file_of(PHOTO)}
    )
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    assert "images of 5 bands, but this one has 3" in response.json()["error"]


async def test_a_letterbox_extends_beyond_the_image(client):
    result = await explained(client, "letterbox", PHOTO)
    region = result["image"]["region"]
    assert region == {"x": 0.0, "y": -12.0, "width": 64.0, "height": 64.0}
    box = result["explanations"][0]["box"]
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 40
