"""The comparison with peers: that all are asked and judged alike, and the arithmetic of its table."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import skimage.data
from PIL import Image
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from benchmarks.peers.__main__ import CLIENTS, Row, ratio, results_table
from benchmarks.peers.answers import NotComparable, first_class
from benchmarks.peers.cases import cases, json_base64, multipart, raw_body
from service.cli.bench.load import Latency, Summary

IMAGES = [b"\xff\xd8 first", b"\xff\xd8 second\r\n--"]


# ---------------------------------------------------------------- questions


def test_the_same_bytes_reach_every_server() -> None:
    assert [request.body for request in raw_body(IMAGES)] == IMAGES
    bodies = [json.loads(request.body) for request in json_base64(IMAGES)]
    assert [base64.b64decode(body["image"]) for body in bodies] == IMAGES

    async def upload(request: Request) -> Response:
        async with request.form() as form:
            return Response(await form["image"].read())

    app = Starlette(routes=[Route("/explain", upload, methods=["POST"])])
    with TestClient(app) as client:
        for request, data in zip(multipart(IMAGES), IMAGES, strict=True):
            answer = client.post(request.path, content=request.body, headers=request.headers)
            assert answer.content == data


def test_every_framework_appears_documented_and_tuned() -> None:
    found = cases("resnet50", ["fp32", "bf16"])
    assert [case.group for case in found] == ["fp32", "bf16", *["documented"] * 3, *["tuned"] * 3]
    assert len({name for case in found for name in case.asked}) == 2 * 3 + 6
    for case in found[2:]:
        server = case.start()
        assert server._env["PEER_MODEL"] == "resnet50"
        assert server._env["PEER_TUNED"] == ("1" if case.group == "tuned" else "0")
        assert "0.0.0.0" not in server._command


# ---------------------------------------------------------------- answers


def picture(side: int = 224) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def predictions(count: int = 5) -> list[dict[str, object]]:
    return [{"class_id": 7 - i, "probability": 0.3 - i / 50} for i in range(count)]


def test_answers_of_peers_and_of_the_service_are_read() -> None:
    peer = {"predictions": predictions(), "heatmap": picture()}
    assert first_class(json.dumps(peer).encode()) == 7
    for output in ("heatmap", "overlay"):
        result = {"predictions": predictions(), "explanations": [{output: {"data": picture()}}]}
        assert first_class(json.dumps({"results": [result]}).encode()) == 7


@pytest.mark.parametrize(
    "answer",
    [
        {"predictions": predictions(4), "heatmap": picture()},
        {"predictions": predictions()[::-1], "heatmap": picture()},
        {"predictions": predictions(), "heatmap": picture(112)},
    ],
)
def test_another_answer_is_not_comparable(answer: dict) -> None:
    with pytest.raises(NotComparable):
        first_class(json.dumps(answer).encode())


# ---------------------------------------------------------------- table


def summary(throughput: float) -> Summary:
    latency = Latency(p50=10, p95=20, p99=30, max=40)
    return Summary(
        load="-", clients=1, rate=None, seconds=1, throughput=throughput, latency=latency,
        refused_latency=None, answered=1, failed=0, statuses={}, codes={}, megabytes=0,
        client_cores=0, lag_ms=0, sent_in_all=1,
    )  # fmt: skip


def row(name: str, group: str, *throughputs: float) -> Row:
    rounds = [{clients: summary(value) for clients in CLIENTS} for value in throughputs]
    return Row(name=name, group=group, rounds=rounds, classes=[1])


def test_ratios_are_of_the_same_round_and_of_its_best_peer() -> None:
    """The second round ran on a machine three times as slow, and another peer was the best."""
    ours = row("Heatlens fp32, heatmap", "fp32", 90, 30, 80)
    peers = [row("a", "tuned", 30, 5, 20), row("b", "tuned", 10, 15, 20)]
    assert ratio(ours, peers, 8) == pytest.approx(3)
    text = io.StringIO()
    Console(file=text, width=150).print(results_table([ours, *peers]))
    assert "Heatlens fp32, heatmap / best tuned" in text.getvalue()
    assert "3.00x" in text.getvalue()
    assert "80.0 (10 / 30)" in text.getvalue()


# ---------------------------------------------------------------- explainers


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.mark.real
def test_both_explainers_answer_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuned peer is the documented one made faster, not another method."""
    pytest.importorskip("torchcam")
    from benchmarks.peers.explainers import Documented, Tuned, chosen

    monkeypatch.setenv("PEER_MODEL", "efficientnet_lite0")
    photographs = [jpeg(skimage.data.coffee()), jpeg(skimage.data.rocket())]
    answers = {}
    for tuned, kind in (("0", Documented), ("1", Tuned)):
        monkeypatch.setenv("PEER_TUNED", tuned)
        explainer = chosen()
        assert isinstance(explainer, kind)
        prepared = [explainer.prepare(data) for data in photographs]
        explained = explainer.explain(prepared)
        body = json.dumps(explainer.answer(prepared[0], explained[0])).encode()
        answers[tuned] = (first_class(body), explained)
    assert answers["0"][0] == answers["1"][0]
    for (p, heat), (q, small) in zip(answers["0"][1], answers["1"][1], strict=True):
        assert float((p - q).abs().max()) < 0.1  # the resizing differs
        coarse = np.asarray(Image.fromarray(heat).resize(small.shape[::-1], Image.Resampling.BOX))
        assert np.corrcoef(coarse.ravel(), small.ravel())[0, 1] > 0.9
