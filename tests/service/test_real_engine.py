"""The API over the real engine on a tiny network."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import random
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from models.methods import METHODS
from service.api.app import create_app
from service.settings import Settings
from service.worker.local import LocalPool
from tests.waiting import eventually

pytestmark = pytest.mark.anyio

SIDE = 32
LABELS = ["ant", "bee", "cat", "dog", "eel"]
SOURCE = f"""
import time

import torch
from torch import nn

pause_s = 0.0


class Pausing(nn.Module):
    def forward(self, x):
        time.sleep(pause_s)
        return x.relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.act = Pausing()
        self.body = nn.Conv2d(6, 8, 3, 2, 1)
        self.out = nn.ReLU()
        self.fc = nn.Linear(8, {len(LABELS)})

    def forward(self, x):
        return self.fc(self.out(self.body(self.act(self.stem(x)))).mean((2, 3)))


def net():
    return Net(), {{"preprocess": {{"crop": {SIDE}, "resize": {SIDE}}}, "labels": {LABELS}}}
"""
SEEDED = [name for name, row in METHODS.items() if "seed" in row.defaults]


def network_module() -> ModuleType:
    """The module of the network, which is imported under a private name."""
    (name,) = (name for name in sys.modules if name.endswith(".net_of_real_engine"))
    return sys.modules[name]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("net")
    (folder / "net_of_real_engine.py").write_text(SOURCE)
    models = [{"name": "tiny", "source": "python:net_of_real_engine:net", "weights": "none"}]
    # Whatever other programs do: a wait is estimated by how fast answers came of late.
    limits = {"timeout_s": 3000.0, "max_wait_s": 3000.0}
    return Settings(models=models, base_dir=folder, server={"devices": ["cpu"]}, limits=limits)


@pytest.fixture(scope="module")
async def running(settings):
    """The application and its pool, the model ready; imports of its source are undone."""
    path = list(sys.path)
    pool = LocalPool(settings)
    app = create_app(settings, pool)
    async with app.router.lifespan_context(app):
        await pool.wait_ready()
        yield app, pool
    sys.path[:] = path


@pytest.fixture(scope="module")
async def client(running) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(running[0])
    async with httpx.AsyncClient(
        transport=transport, base_url="http://testserver", timeout=100
    ) as client:
        yield client


@pytest.fixture
def pauses(running):
    """Sets how long each pass of the network takes."""
    module = network_module()

    def pause(seconds: float) -> None:
        module.pause_s = seconds

    yield pause
    pause(0.0)


def image_of(seed: int) -> str:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((50, 40)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


async def post(client, path: str, *, seeds=(0,), images=None, status=200, **options):
    images = images or [{"b64": image_of(seed)} for seed in seeds]
    answer = await client.post(f"/v1/{path}", json={"images": images, **options})
    assert answer.status_code == status, answer.text
    return answer.json()


async def explain(client, *, seeds=(0,), images=None, **options) -> list[dict]:
    """Results, with the raw maps in place of images."""
    options = {"outputs": ["values"], "samples": 4, "steps": 3} | options
    results = (await post(client, "explain", seeds=seeds, images=images, **options))["results"]
    for result in results:
        for explanation in result["explanations"]:
            values = explanation["values"]
            raw = np.frombuffer(base64.b64decode(values["data"]), "<f4")
            explanation["map"] = raw.reshape(values["shape"])
    return results


def maps(results) -> list[np.ndarray]:
    return [e["map"] for result in results for e in result["explanations"]]


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * max(1e-6, np.abs(b).max()))


async def test_64_concurrent_requests_of_mixed_methods_equal_sequential_ones(client):
    card = (await client.get("/v1/models/tiny")).json()
    applicable = [row["name"] for row in card["methods"] if row["applicable"]]
    assert len(applicable) >= 28
    rest = random.Random(0)
    wanted = [
        {
            "seeds": (number,),
            "methods": [name, rest.choice(applicable)] if number % 3 else [name],
            "targets": rest.sample(["top1", "top2", "bee", 3], rest.randint(1, 3)),
            "layers": rest.choice([["auto"], ["body", "out"]]),
            "seed": number,
        }
        for number, name in zip(range(64), itertools.cycle(applicable), strict=False)
    ]
    wanted = [w | {"methods": list(dict.fromkeys(w["methods"]))} for w in wanted]
    # CAM is defined at the target layer only.
    wanted = [w | ({"layers": ["auto"]} if "cam" in w["methods"] else {}) for w in wanted]
    together = await asyncio.gather(*(explain(client, **options) for options in wanted))
    for options, found in zip(wanted, together, strict=True):
        alone = await explain(client, **options)
        assert_same(maps(found), maps(alone))
        names = [
            [e["method"], e["layer"], e["target"]["class_id"]] for e in found[0]["explanations"]
        ]
        assert names == [
            [e["method"], e["layer"], e["target"]["class_id"]] for e in alone[0]["explanations"]
        ]


async def test_each_image_has_its_own_targets(client):
    images = [
        {"b64": image_of(0), "targets": [1]},
        {"b64": image_of(1)},
        {"b64": image_of(2), "targets": ["dog", {"class": 1, "against": ["top1", 4]}]},
    ]
    options = {"methods": ["gradcam", "rise"], "targets": [4, 0]}
    results = await explain(client, images=images, **options)
    assert [[e["target"]["class_id"] for e in r["explanations"]] for r in results] == [
        [1] * 2, [4, 0] * 2, [3, 1] * 2,
    ]  # fmt: skip
    for image, found in zip(images, results, strict=True):
        assert_same(maps([found]), maps(await explain(client, images=[image], **options)))


@pytest.mark.parametrize(
    ("fuse", "combine"), [("mean", np.mean), ("max", np.max), ("product", np.prod)]
)
async def test_fusion_combines_the_maps_of_the_layers(client, fuse, combine):
    options = {"methods": ["hirescam"], "layers": ["body", "out"], "targets": [0, 2]}
    separate = maps(await explain(client, **options))
    fused = (await explain(client, fuse=fuse, **options))[0]["explanations"]
    assert [e["layer"] for e in fused] == ["body+out"] * 2
    for t, explanation in enumerate(fused):
        layers = [unit(m) for m in separate[2 * t : 2 * t + 2]]  # of one size here
        np.testing.assert_allclose(explanation["map"], combine(layers, axis=0), atol=1e-5)


def unit(values: np.ndarray) -> np.ndarray:
    span = np.ptp(values)
    return (values - values.min()) / span if span else np.zeros_like(values)


async def test_interventions_change_predictions_maps_and_features(client):
    every = [{"layer": "out", "channels": list(range(8)), "op": "zero"}]
    one = [{"layer": "out", "channels": [2], "op": "scale", "value": 3.0}]
    plain, emptied, scaled = [
        (await post(client, "predict", interventions=changes))["results"][0]["predictions"]
        for changes in ([], every, one)
    ]
    again = (await post(client, "predict", seeds=(7,), interventions=every))["results"][0]
    assert emptied == again["predictions"]  # the biases alone
    assert plain != emptied != scaled != plain
    features = await post(client, "features", layers=["out"], channels=8, interventions=one)
    before = await post(client, "features", layers=["out"], channels=8)
    means = [
        {c["index"]: c["mean"] for c in f["results"][0]["features"][0]["top_channels"]}
        for f in (before, features)
    ]
    for channel, mean in means[0].items():
        factor = 3.0 if channel == 2 else 1.0
        assert means[1][channel] == pytest.approx(factor * mean, rel=1e-4)
    names = ["gradcam", "scorecam", "ablationcam", "saliency"]
    empty = await explain(client, methods=names, interventions=every)
    whole = await explain(client, methods=names)
    assert not any(m.any() for m in maps(empty)[:1])
    for a, b in zip(maps(whole), maps(empty), strict=True):
        assert not np.array_equal(a, b)


async def test_grids_are_pictures_of_the_top_channels(client):
    options = {"layers": ["body"], "channels": 5, "grid": True, "colormap": "viridis"}
    (features,) = (await post(client, "features", **options))["results"][0]["features"]
    assert len(features["top_channels"]) == 5
    grid = features["grid"]
    with Image.open(io.BytesIO(base64.b64decode(grid["data"]))) as drawn:
        assert drawn.size == (grid["width"], grid["height"])
        pixels = np.asarray(drawn.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


async def test_statistics_of_all_kinds(client):
    kinds = ["output", "input", "grad_output", "grad_input"]
    options = {"layers": ["body", "fc"], "kinds": kinds, "targets": ["ant", 3]}
    features = (await post(client, "features", **options))["results"][0]["features"]
    places = [(f["layer"], f["kind"], f.get("target")) for f in features]
    assert places == [
        (layer, kind, target)
        for layer in ("body", "fc")
        for kind in kinds
        for target in ((0, 3) if kind.startswith("grad") else (None,))
    ]
    shapes = {(f["layer"], f["kind"]): f["shape"] for f in features}
    assert shapes["body", "output"] == shapes["body", "grad_output"] == [8, 8, 8]
    assert shapes["body", "input"] == shapes["body", "grad_input"] == [6, 16, 16]
    # The gradient of a class's score by the scores is 1 at the class.
    for found in features:
        if found["layer"] == "fc" and found["kind"] == "grad_output":
            assert found["l2"] == pytest.approx(1.0)
            assert found["top_channels"][0]["index"] == found["target"]


async def test_weights_of_channels_are_in_the_statistics(client):
    (result,) = await explain(client, methods=["gradcam"], statistics=True)
    (explanation,), (statistics,) = result["explanations"], result["statistics"]
    assert statistics["layer"] == explanation["layer"]
    assert all(channel["weight"] is not None for channel in statistics["top_channels"])


async def test_faithfulness_beside_a_random_map(client):
    measures = ["average_drop", "increase", "deletion", "insertion", "road"]
    options = {"methods": ["gradcam", "occlusion"], "faithfulness": measures, "seed": 5}
    (result,) = await explain(client, **options)
    for explanation in result["explanations"]:
        assert set(explanation["faithfulness"]) == set(measures)
        for pair in explanation["faithfulness"].values():
            assert all(np.isfinite(pair[k]) for k in ("value", "random"))
    first, _ = (e["faithfulness"] for e in result["explanations"])
    assert first["deletion"]["value"] != first["deletion"]["random"]
    (again,) = await explain(client, **options | {"methods": ["gradcam"]})
    assert [e["faithfulness"] for e in again["explanations"]] == [first]


@pytest.mark.parametrize("name", SEEDED)
async def test_the_same_seed_gives_the_same_map(client, name):
    first, again, other = [
        maps(await explain(client, methods=[name], layers=["body"], seed=seed))[0]
        for seed in (11, 11, 12)
    ]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


async def test_a_deadline_stops_a_long_method_between_its_steps(client, running, pauses):
    options = {"methods": ["rise"], "samples": 600, "timeout_s": 4.0}
    asked = asyncio.create_task(post(client, "explain", status=504, **options))
    await eventually(lambda: running[1].devices()[0].queue_depth)
    # Once it is admitted: the price learns how long passes take.
    pauses(0.3)
    answer = await asked
    assert answer["code"] == "deadline_exceeded"
    await eventually(lambda: running[1].devices()[0].queue_depth == 0)
    await assert_at_rest(client, running[1])


async def assert_at_rest(client, pool) -> None:
    """No pass runs any more: the next prediction is the only one."""
    network_module().pause_s = 0.0

    def batches() -> int:
        return sum(count.batches for count in pool.devices()[0].batches)

    # Once it is answered, the count is up to date.
    await post(client, "predict")
    before = batches()
    await post(client, "predict")
    assert batches() == before + 1


@asynccontextmanager
async def listening(app) -> AsyncIterator[int]:
    """The application behind a real server, for clients that can go away."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # whoever comes early waits
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def test_a_client_that_goes_away_frees_the_device(running, client, pauses):
    app, pool = running
    pauses(0.03)
    long = {"images": [{"b64": image_of(0)}], "methods": ["rise"], "samples": 10_000}
    body = json.dumps(long).encode()
    head = ["POST /v1/explain HTTP/1.1", "Host: x", "Content-Type: application/json"]
    lines = [*head, f"Content-Length: {len(body)}", "", ""]
    async with listening(app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write("\r\n".join(lines).encode() + body)
        await eventually(lambda: pool.devices()[0].queue_depth)
        # Predictions are answered in between.
        await post(client, "predict")
        assert pool.devices()[0].queue_depth == 1
        writer.transport.abort()
        begun = time.monotonic()
        await eventually(lambda: pool.devices()[0].queue_depth == 0)
        assert time.monotonic() - begun < 10  # of at least 19 s
    await assert_at_rest(client, pool)
