"""Labels in requests over the real engine: answers name them, and what is wrong with them is said."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest
from PIL import Image

from heatlens import AsyncClient
from heatlens.asgi import ASGITransport
from service.api.app import create_app
from service.settings import Settings
from service.worker.local import LocalPool
from tests.models.sources.clip import saved

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.anyio

OWN = ["a photo of a cat", "a photo of a dog"]
SENT = ["a cup", "coffee", "a dog of coffee"]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def pool(tmp_path_factory) -> AsyncIterator[LocalPool]:
    folder = tmp_path_factory.mktemp("folder")
    saved(folder / "clip", "clip")
    small = {"preprocess": {"crop": 64}, "weights": "none"}
    settings = Settings(
        models=[
            {"name": "texts", "source": "transformers:clip", "labels": OWN},
            {"name": "bare", "source": "transformers:clip"},
            {"name": "plain", "source": "timm:resnet10t", "num_classes": 3, **small},
        ],
        default_model="texts",
        base_dir=folder,
        server={"devices": ["cpu"]},
        limits={"timeout_s": 100.0, "max_wait_s": 1000.0},
    )
    pool = LocalPool(settings)
    pool.app = create_app(settings, pool)
    async with pool.app.router.lifespan_context(pool.app):
        await pool.wait_ready()
        yield pool


@pytest.fixture(scope="module")
async def client(pool) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(pool.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def png(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def body(*seeds: int, **options) -> dict:
    images = [{"b64": base64.b64encode(png(seed)).decode()} for seed in seeds or (1,)]
    return {"images": images, **options}


async def post(client, path: str, status: int = 200, **sent) -> dict:
    answer = await client.post(path, json=body(**sent))
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_an_answer_names_the_labels_of_its_request(client):
    sent = {"labels": SENT, "targets": ["coffee", 2, "top1"], "methods": ["gradcam"]}
    (result,) = (await post(client, "/v1/explain", **sent))["results"]
    assert {p["label"] for p in result["predictions"]} == set(SENT)
    assert sum(p["probability"] for p in result["predictions"]) == pytest.approx(1)
    named = [e["target"]["label"] for e in result["explanations"]]
    assert named[:2] == ["coffee", "a dog of coffee"]
    own = (await post(client, "/v1/predict"))["results"][0]["predictions"]
    assert {p["label"] for p in own} == set(OWN)


async def test_requests_at_once_with_other_labels_get_their_own(client):
    sets = [SENT, SENT[:2], OWN[::-1], ["a cat", "of", "photo", "cup of coffee"]]
    asked = [post(client, "/v1/predict", labels=labels) for labels in sets for _ in range(3)]
    answers = await asyncio.gather(*asked)
    for i, answer in enumerate(answers):
        labels = sets[i // 3]
        alone = await post(client, "/v1/predict", labels=labels)
        found, expected = (
            {p["label"]: p["score"] for p in a["results"][0]["predictions"]}
            for a in (answer, alone)
        )
        assert set(found) == set(labels)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


async def test_a_query_a_form_the_client_and_other_protocols_take_them(client, pool):
    files = {"image": png(1)}
    by_query = await client.post("/v1/predict", files=files, params={"labels": SENT})
    expected = [p["label"] for p in by_query.json()["results"][0]["predictions"]]
    assert set(expected) == set(SENT)
    transport = ASGITransport(pool.app)
    async with AsyncClient("http://test", transport=transport) as ours:
        found = await ours.predict(png(1), labels=SENT, model="texts")
        assert [p.label for p in found.results[0].predictions] == expected
        with_text = await ours.explain(png(1), labels=SENT, targets=[SENT[1]], model="bare")
        assert with_text.results[0].explanations[0].target.label == SENT[1]
    tensor = {
        "name": "image",
        "shape": [1],
        "datatype": "BYTES",
        "data": [base64.b64encode(png(1)).decode()],
    }
    sent = {"inputs": [tensor], "parameters": {"labels": ",".join(SENT)}}
    answer = await client.post("/v2/models/texts/infer", json=sent)
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: output for output in answer.json()["outputs"]}
    assert outputs["scores"]["shape"] == [1, 3]


@pytest.mark.parametrize(
    ("sent", "field", "text"),
    [
        ({"labels": SENT, "model": "plain"}, "labels", "are fixed"),
        ({"labels": ["a cat"]}, "labels", "two or more"),
        ({"labels": ["a cat", "a cat"]}, "labels", "twice"),
        ({"labels": ["a cat", "  "]}, "labels", "blank"),
        ({"labels": ["a cat", ""]}, "labels.1", "empty"),
        ({"labels": ["a cat", 3]}, "labels.1", "text"),
        ({"labels": ["a cat", "a" * 513]}, "labels.1", "512 characters"),
        ({"labels": [f"cat {i}" for i in range(257)]}, "labels", "at most 256"),
        ({"labels": ["a cat", "a " * 40]}, "labels.1", "42 tokens; the network takes 16"),
        ({"model": "bare"}, "labels", "no labels of its own"),
        ({"labels": SENT, "targets": [3]}, "targets.0", "0 to 2"),
        ({"labels": SENT, "targets": ["top4"]}, "targets.0", "top3"),
        ({"labels": SENT, "targets": [OWN[0]]}, "targets.0", "no such label"),
    ],
)
async def test_labels_that_do_not_fit_are_refused(client, sent, field, text):
    answer = await client.post("/v1/explain", json=body(**sent))
    assert answer.status_code in (404, 422), answer.text
    assert answer.json()["field"] == field
    assert text in answer.json()["error"]


async def test_labels_that_take_too_long_to_encode_are_refused_before_anything_runs(client, pool):
    info = next(info for info in pool.models() if info.card.name == "texts")
    labels = [f"{i} {'dog ' * 20}" for i in range(250)]
    allowed_s = 0.9 * info.card.texts.encoding_ms(labels) / 1000
    answer = await client.post("/v1/predict", json=body(labels=labels, timeout_s=allowed_s))
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == "labels"


async def test_labels_that_were_encoded_cost_no_more_than_others(client, pool):
    labels = [f"{i} {'cat ' * 8}" for i in range(250)]
    sent = {"labels": labels, "top_k": 1}
    await post(client, "/v1/predict", **sent)
    info = next(info for info in pool.models() if info.card.name == "texts")
    sent["timeout_s"] = max(1.0, 0.9 * info.card.texts.encoding_ms(labels) / 1000)
    await post(client, "/v1/predict", **sent)


async def test_the_card_says_what_texts_may_be(client):
    card = (await client.get("/v1/models/texts")).json()
    assert card["task"] == "zero_shot"
    assert card["texts"]["most_tokens"] == 16
    assert card["texts"]["memory_bytes"] > 1000
    assert card["texts"]["text_ms"] > 0
    assert any("stays loaded" in note for note in card["notes"])
    assert (await client.get("/v1/models/plain")).json().get("texts") is None
