"""`POST /v1/compare` over the real engine: similarities and maps, alone and in company, and errors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from heatlens import AsyncClient
from heatlens.asgi import ASGITransport
from models import engine
from models.catalog import ModelSpec
from models.methods import METHODS
from models.sources import load
from service.api.app import create_app
from service.settings import Settings
from service.worker.local import LocalPool

pytestmark = pytest.mark.anyio

SIDE = 32
SOURCE = f"""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())

    def forward(self, x):
        return self.body(self.stem(x)).mean((2, 3))

class Single(Net):
    def forward(self, x):
        assert len(x) == 1
        return super().forward(x)

def net(kind=Net):
    torch.manual_seed(0)
    return kind(), {{"preprocess": {{"resize": [{SIDE}, {SIDE}]}}}}

def single():
    return net(Single)
"""
ENTRY = {"source": "python:net.py:net", "weights": "none", "task": "embedding"}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made: Path = tmp_path_factory.mktemp("net")
    (made / "net.py").write_text(SOURCE)
    return made


@pytest.fixture(scope="module")
async def app(folder) -> AsyncIterator[object]:
    small = {"preprocess": {"crop": 64}, "weights": "none"}
    settings = Settings(
        models=[
            {"name": "vectors", **ENTRY},
            {"name": "single", **ENTRY, "source": "python:net.py:single"},
            {"name": "plain", "source": "timm:resnet10t", "num_classes": 3, **small},
            {"name": "pooled", "source": "timm:resnet10t", "task": "embedding", **small},
        ],
        default_model="vectors",
        base_dir=folder,
        server={"devices": ["cpu"]},
        limits={"timeout_s": 100.0, "max_wait_s": 1000.0},
    )
    pool = LocalPool(settings)
    made = create_app(settings, pool)
    async with made.router.lifespan_context(made):
        await pool.wait_ready()
        yield made


@pytest.fixture(scope="module")
async def client(app) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def passes(app, monkeypatch) -> list[int]:
    """Images of every shared pass from now on."""
    seen: list[int] = []
    run = engine.run_shared_pass

    def counted(warm, jobs, **given):
        seen.append(len(jobs))
        return run(warm, jobs, **given)

    monkeypatch.setattr(engine, "run_shared_pass", counted)
    return seen


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def body(*seeds: int, **options) -> dict:
    return {"images": [{"b64": base64.b64encode(png(s)).decode()} for s in seeds], **options}


async def compare(client, *seeds: int, status=200, **options) -> dict:
    answer = await client.post("/v1/compare", json=body(*seeds, **options))
    assert answer.status_code == status, answer.text
    return answer.json()


def map_of(explanation: dict) -> np.ndarray:
    values = explanation["values"]
    raw = np.frombuffer(base64.b64decode(values["data"]), "<f4")
    return raw.reshape(values["shape"])


async def test_similarity_and_grad_cam_are_those_of_autograd(client, folder):
    net = load(ModelSpec(name="m", **ENTRY), folder).module.double()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()
    images = torch.stack([torch.from_numpy(pixels(s)).double().div(255) for s in (1, 2)])
    inputs = ((images - mean) / std).permute(0, 3, 1, 2)
    vectors = net(inputs)
    answer = await compare(client, 1, 2, outputs=["values"], layers=["stem"])
    cosine = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0)
    assert answer["similarity"] == pytest.approx(float(cosine), abs=1e-5)
    for place, result in enumerate(answer["results"]):
        activation = net.stem(inputs[place : place + 1]).requires_grad_()
        own = net.body(activation).mean((2, 3))[0]
        score = own @ vectors[1 - place] / own.norm() / vectors[1 - place].norm()
        (gradient,) = torch.autograd.grad(score, activation)
        weights = gradient.mean((2, 3), keepdim=True)
        expected = (weights * activation).sum(1).relu()[0].detach().numpy()
        found = map_of(result["explanations"][0])
        assert expected.max() > 0
        np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max() + 1e-7)


REFUSED = ("cam", "finercam", "shapleycam", "fullgrad", "lrp")
METHODS_THAT_APPLY = [
    name for name, row in METHODS.items() if row.family != "transformer" and name not in REFUSED
]


async def test_pairs_in_company_get_what_they_get_alone(client):
    options = {"methods": METHODS_THAT_APPLY, "samples": 4, "steps": 3, "outputs": ["values"]}
    pairs = [(1, 2), (1, 3), (4, 1), (1, 1)]
    together = await asyncio.gather(*(compare(client, *pair, **options) for pair in pairs))
    assert together[3]["similarity"] == pytest.approx(1)
    for pair, found in zip(pairs, together, strict=True):
        alone = await compare(client, *pair, **options)
        assert found["similarity"] == pytest.approx(alone["similarity"], abs=1e-6)
        for one, other in zip(found["results"], alone["results"], strict=True):
            for a, b in zip(one["explanations"], other["explanations"], strict=True):
                expected = map_of(b)
                scale = np.abs(expected).max()
                np.testing.assert_allclose(map_of(a), expected, atol=1e-3 * scale + 1e-6)
    first, second = (map_of(t["results"][0]["explanations"][0]) for t in together[:2])
    assert not np.allclose(first, second)


async def test_both_images_share_one_pass(client, passes):
    await compare(client, 1, 2)
    assert passes == [2]


async def test_progress_comes_as_events_and_the_result_at_last(client):
    options = {"methods": ["rise"], "samples": 300, "outputs": ["values"]}
    expected = await compare(client, 1, 2, **options)
    answer = await client.post(
        "/v1/compare", json=body(1, 2, **options), headers={"accept": "text/event-stream"}
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = json.loads(answer.text.rpartition("data: ")[2])
    assert found["similarity"] == pytest.approx(expected["similarity"], abs=1e-6)


async def test_a_network_for_single_images_compares_as_another(client):
    single = await compare(client, 1, 2, model="single", outputs=["values"], layers=["stem"])
    plain = await compare(client, 1, 2, outputs=["values"], layers=["stem"])
    assert single["similarity"] == pytest.approx(plain["similarity"], abs=1e-5)
    for one, other in zip(single["results"], plain["results"], strict=True):
        a, b = (map_of(r["explanations"][0]) for r in (one, other))
        np.testing.assert_allclose(a, b, atol=1e-4 * b.max())


async def test_maps_that_are_made_in_parts_are_those_of_one_pass(client, monkeypatch):
    options = {
        "layers": ["stem", "body"],
        "methods": ["gradcam", "layercam"],
        "outputs": ["values"],
    }
    whole = await compare(client, 1, 2, **options)
    monkeypatch.setattr("models.engine._is_cut", lambda *_: True)
    monkeypatch.setattr("models.slices.exceeds_step", lambda _, asked, __: len(asked.layers) > 1)
    cut = await compare(client, 1, 2, **options)
    for one, other in zip(cut["results"], whole["results"], strict=True):
        for a, b in zip(one["explanations"], other["explanations"], strict=True):
            assert (a["method"], a["layer"]) == (b["method"], b["layer"])
            np.testing.assert_allclose(map_of(a), map_of(b), rtol=1e-3, atol=1e-6)


async def test_a_form_and_the_client_say_the_same(app, client):
    files = [("image", png(1)), ("image", png(2))]
    answer = await client.post("/v1/compare", files=files, params={"methods": "layercam"})
    transport = ASGITransport(app)
    async with AsyncClient("http://test", transport=transport) as ours:
        found = await ours.compare(png(1), png(2), methods=["layercam"], model="vectors")
    assert found.similarity == pytest.approx(answer.json()["similarity"])
    assert [r.explanations[0].overlay.size for r in found.results] == [(SIDE, SIDE)] * 2


async def test_a_network_of_timm_is_compared_before_its_classifier(client):
    card = (await client.get("/v1/models/pooled")).json()
    assert card["task"] == "embedding"
    assert card["target_layer"].startswith("layer4")
    reasons = {m["name"]: m["reason"] for m in card["methods"] if not m["applicable"]}
    assert set(REFUSED) <= set(reasons)
    answer = await compare(client, 1, 2, model="pooled")
    assert -1 <= answer["similarity"] <= 1


@pytest.mark.parametrize(
    ("path", "asked", "field", "text"),
    [
        ("predict", body(1), "model", "POST /v1/compare"),
        ("explain", body(1), "model", "POST /v1/compare"),
        ("features", body(1, kinds=["grad_output"]), "kinds", "no score"),
        ("compare", body(1), "images", "Exactly two"),
        ("compare", body(1, 2, 3), "images", "Exactly two"),
        ("compare", body(1, 2, model="plain"), "model", "embedding"),
        ("compare", body(1, 2, methods=["finercam"]), "methods.0", "similarity has none"),
        ("compare", body(1, 2, targets=["top1"]), "targets", "Unknown option"),
        ("compare", body(1, 2, layers=["nowhere"]), "layers.0", "No layer"),
        (
            "compare",
            body(1, 2, methods=["rise"], samples=10_000, timeout_s=0.5),
            "samples",
            "needs about",
        ),
    ],
)
async def test_what_has_no_meaning_is_refused(client, path, asked, field, text):
    answer = await client.post(f"/v1/{path}", json=asked)
    assert answer.status_code in (404, 422), answer.text
    assert answer.json()["field"] == field
    assert text in answer.json()["error"]


async def test_other_protocols_say_why_there_are_no_classes(client):
    image = base64.b64encode(png(1)).decode()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [image]}
    asked = {
        "/v2/models/vectors/infer": {"inputs": [tensor]},
        "/v1/models/vectors:predict": {"instances": [image]},
        "/predictions/vectors": {"instances": [image]},
    }
    for path, sent in asked.items():
        answer = await client.post(path, json=sent)
        assert answer.status_code == 422, path
        assert "POST /v1/compare" in answer.text
    assert (await client.get("/v2/models/vectors")).status_code == 200


async def test_equal_images_have_nothing_that_could_make_them_more_alike(client):
    answer = await compare(client, 5, 5, methods=["gradcam", "saliency"])
    assert answer["similarity"] == pytest.approx(1)
    size = [e["range"]["max"] for r in answer["results"] for e in r["explanations"]]
    assert max(size) < 1e-5


async def test_one_bad_image_fails_the_comparison(client):
    files = [("image", png(1)), ("image", b"\x89PNG\r\n\x1a\n")]
    answer = await asyncio.wait_for(client.post("/v1/compare", files=files), 60)
    assert answer.status_code == 422
    assert answer.json()["code"] == "image_undecodable"


async def test_features_of_a_network_without_classes(client):
    answer = await client.post("/v1/features", json=body(1))
    assert answer.status_code == 200, answer.text
    assert answer.json()["results"][0]["features"]
