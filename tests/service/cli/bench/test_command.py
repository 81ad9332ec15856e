"""`heatlens bench` against a server in a thread."""

from __future__ import annotations

import functools
import io
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from service.cli import main as cli
from service.cli.bench.load import SWEEP_CLIENTS, SWEEP_SHARES
from service.cli.bench.requests import BenchError, draw_images, read_images
from service.cli.common import EXIT_UNREACHABLE


def run(*arguments: object):
    wide = {"COLUMNS": "200"}
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)], env=wide)


def said(result) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout + result.stderr)
    return re.sub(r"[\s│╭╮╰╯─]+", " ", plain)


@pytest.fixture
def classifier(serve_apart, respond):
    """Takes the mean colour of an image as its scores; refuses the requests in `refused`."""
    refused: set[int] = set()

    async def classify(seen):
        if len(server.seen) in refused:
            return respond({"code": "overloaded"}, status=429, seen=seen)
        pixels = Image.open(io.BytesIO(seen.body)).convert("RGB").resize((1, 1)).getpixel((0, 0))
        predictions = [{"class_id": i, "score": float(value)} for i, value in enumerate(pixels)]
        image = {"width": 1, "height": 1}
        return respond({"results": [{"image": image, "predictions": predictions}]}, seen=seen)

    server, url = serve_apart(classify)
    server.refused = refused
    return server, url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, data in enumerate(draw_images(4, size=(60, 40))):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    return tmp_path


def test_a_closed_loop_as_json(classifier, folder: Path) -> None:
    server, url = classifier
    server.refused.add(20)
    result = run(
        url, "--clients", 3, "--requests", 40, "--warmup", 0, "--images", folder, "--verify",
        "--operation", "predict", "-O", "top_k=3", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, said(result)
    report = json.loads(result.stdout)
    (row,) = report["runs"]
    assert (report["operation"], report["images"]) == ("predict", 4)
    assert (row["answered"], row["failed"], row["codes"]) == (39, 1, {"overloaded": 1})
    assert row["throughput"] > 0
    assert {seen.line for seen in server.seen} == {"POST /v1/predict?top_k=3 HTTP/1.1"}
    # One checks the service, one for each image is to compare with, and the load.
    assert len(server.seen) == 1 + 4 + 40


def test_wrong_responses_are_a_failure(serve_apart, respond, folder: Path) -> None:
    async def changing(seen):
        score = 1.0 if len(server.seen) < 11 else 2.0
        result = {
            "image": {"width": 1, "height": 1},
            "predictions": [{"class_id": 1, "score": score}],
        }
        return respond({"results": [result]}, seen=seen)

    server, url = serve_apart(changing)
    result = run(url, "--requests", 8, "--warmup", 0, "--images", folder, "--verify")
    assert result.exit_code == 1
    assert "3 wrong_response" in said(result)


def test_open_loop_with_drawn_images(classifier, monkeypatch) -> None:
    small = functools.partial(draw_images, size=(64, 48))
    monkeypatch.setattr("service.cli.bench.command.draw_images", small)
    server, url = classifier
    server.refused.add(5)
    result = run(url, "--rate", 50, "--requests", 12, "--warmup", 0)
    assert result.exit_code == 0, said(result)
    assert "50.0/s" in said(result)
    assert "1 overloaded" in said(result)
    assert "64 images" in said(result)


def test_the_sweep_finds_its_rates(classifier, folder: Path, tmp_path: Path) -> None:
    _, url = classifier
    result = run(url, "--sweep", "--duration", 0.2, "--warmup", 0, "--images", folder, "--json")
    assert result.exit_code == 0, said(result)
    rows = json.loads(result.stdout)["runs"]
    assert [row["clients"] for row in rows if row["clients"]] == list(SWEEP_CLIENTS)
    best = max(row["throughput"] for row in rows if row["clients"])
    rates = [row["rate"] for row in rows if row["rate"]]
    assert rates == pytest.approx([share * best for share in SWEEP_SHARES])


def test_a_service_that_refuses_is_not_loaded(serve_apart, respond) -> None:
    async def refuse(_seen):
        return respond({"code": "unauthorized"}, status=401)

    server, url = serve_apart(refuse)
    result = run(url)
    assert result.exit_code == 1
    assert "401 unauthorized" in said(result)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("arguments", "text", "code"),
    [
        (["http://192.0.2.7"], "not this machine", 2),
        (["http://127.0.0.1:9"], "does not respond", EXIT_UNREACHABLE),
        (["http://127.0.0.1:9", "--rate", 1, "--sweep"], "Choose one", 2),
        (["http://127.0.0.1:9", "-O", "methods"], "NAME=VALUE", 2),
        (["http://127.0.0.1:9", "--operation", "paint"], "paint", 2),
    ],
)
def test_mistakes_are_explained(arguments: list, text: str, code: int) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert text in said(result)
    assert "Traceback" not in said(result)


def test_an_empty_folder(classifier, tmp_path: Path) -> None:
    result = run(classifier[1], "--images", tmp_path)
    assert result.exit_code == 1
    assert "There are no images" in said(result)
    with pytest.raises(BenchError):
        read_images(tmp_path)


def test_without_aiohttp_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "service.cli.bench.client", raising=False)
    result = run("http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "pip install 'heatlens[bench]'" in said(result)


def test_drawn_images_are_different_and_the_same_again() -> None:
    images = draw_images(5, size=(500, 375))
    assert len(set(images)) == 5
    assert images == draw_images(5, size=(500, 375))
    with Image.open(io.BytesIO(images[0])) as image:
        assert (image.format, image.size) == ("JPEG", (500, 375))
    # Photographs of this size are as large.
    assert 40_000 < len(images[0]) < 250_000
