"""Segmentation over the API, the real engine on a tiny network: areas, answers and errors."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest
from PIL import Image

from service.api.app import create_app
from service.settings import Settings
from service.worker.local import LocalPool

pytestmark = pytest.mark.anyio

SIDE = 32
SOURCE = f"""
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1), nn.ReLU())
        self.score = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return {{"out": F.interpolate(self.score(self.body(x)), x.shape[2:]), "aux": x}}

def net():
    return Net(), {{"preprocess": {{"resize": [{SIDE}, {SIDE}]}}, "labels": ["sky", "sea", "land"]}}
"""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def client(tmp_path_factory) -> AsyncIterator[httpx.AsyncClient]:
    folder = tmp_path_factory.mktemp("net")
    (folder / "seg.py").write_text(SOURCE)
    model = {"name": "seg", "source": "python:seg.py:net", "weights": "none"}
    classifier = {"name": "plain", "source": "timm:resnet10t", "weights": "none", "num_classes": 3}
    pool = LocalPool(
        settings := Settings(
            models=[{**model, "task": "segmentation"}, classifier | {"preprocess": {"crop": 32}}],
            default_model="seg",
            base_dir=folder,
            server={"devices": ["cpu"]},
            limits={"timeout_s": 100.0, "max_wait_s": 1000.0},
        )
    )
    app = create_app(settings, pool)
    async with app.router.lifespan_context(app):
        await pool.wait_ready()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def picture(seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((64, 48)).save(buffer, "PNG")
    return buffer.getvalue()


async def explain(client, *, status=200, **options) -> dict:
    body = {"images": [{"b64": base64.b64encode(picture()).decode()}], **options}
    answer = await client.post("/v1/explain", json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if status != 200 else answer.json()["results"][0]


BOX = {"x": 0, "y": 0, "width": 32, "height": 24}


async def test_predictions_are_shares_of_the_pixels(client):
    answer = await client.post("/v1/predict", files={"image": picture()})
    predictions = answer.json()["results"][0]["predictions"]
    assert {p["label"] for p in predictions} == {"sky", "sea", "land"}
    shares = [p["probability"] for p in predictions]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    card = (await client.get("/v1/models/seg")).json()
    assert card["task"] == "segmentation"
    assert any("all pixels" in note for note in card["notes"])


async def test_targets_have_areas_of_the_image(client):
    mask = np.zeros((48, 64), np.uint8)
    mask[:24, :32] = 200
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    targets = [
        "sea",
        {"class": "sea", "box": BOX},
        {"class": "sea", "mask": png},
        {"class": "sea", "box": BOX, "against": ["land"]},
        {"class": "top1", "point": {"x": 60, "y": 40}},
    ]
    result = await explain(client, targets=targets, methods=["gradcam", "occlusion"], steps=3,
                           outputs=["overlay", "values"])  # fmt: skip
    whole, box, masked, contrast, point = result["explanations"][:5]
    assert "area" not in whole
    assert [e["area"] for e in (box, masked, contrast, point)] == [0, 1, 0, 2]
    assert {e["target"]["label"] for e in (whole, box, masked, contrast)} == {"sea"}
    assert box["target"]["score"] == pytest.approx(masked["target"]["score"], abs=1e-5)
    assert box["values"] == masked["values"]
    assert box["values"] != contrast["values"]
    assert len({e["target"]["score"] for e in (whole, box, point)}) == 3


async def test_gradients_of_features_are_of_the_area_too(client):
    body = {
        "images": [{"b64": base64.b64encode(picture()).decode()}],
        "targets": [{"class": "land", "box": BOX}],
        "kinds": ["grad_output"],
        "layers": ["body.2"],
    }
    answer = (await client.post("/v1/features", json=body)).json()
    assert [f["target"] for f in answer["results"][0]["features"]] == [2]


@pytest.mark.parametrize(
    ("options", "status", "field", "text"),
    [
        (
            {"model": "plain", "targets": [{"class": 0, "box": BOX}]},
            422,
            "targets.0",
            "not segment",
        ),
        ({"targets": [{"class": 0, "against": [1]}]}, 422, "targets.0", "pixels of its own"),
        ({"targets": [{"class": 9, "box": BOX}]}, 422, "targets.0.class", "0 to 2"),
        ({"targets": [{"class": 0, "box": {}}]}, 422, "targets.0.box", "A box is"),
        ({"targets": [{"class": 0, "point": {"x": 99, "y": 1}}]}, 422, "targets", "no pixel"),
        ({"targets": [{"class": 0, "mask": "AAAA"}]}, 422, "targets", "base64 of a PNG"),
        ({"methods": ["finercam"]}, 422, "methods.0", "pixels of their own"),
        ({"methods": ["cam"]}, 422, "methods.0", "single linear layer"),
    ],
)
async def test_what_does_not_apply_says_why(client, options, status, field, text):
    error = await explain(client, status=status, **options)
    assert error["field"] == field
    assert text in error["error"]


async def test_a_request_has_few_masks(client):
    mask = base64.b64encode(picture()).decode()
    targets = [{"class": 0, "mask": f"{mask[:-4]}{i:04}"} for i in range(16)]
    image = {"b64": base64.b64encode(picture()).decode(), "targets": targets}
    answer = await client.post("/v1/explain", json={"images": [image] * 3})
    assert answer.status_code == 422
    assert "32 masks" in answer.json()["error"]
