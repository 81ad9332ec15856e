"""`heatlens bench` against a server in a thread."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from service.cli import main as cli
from service.cli.bench.pictures import NoPictures, draw_pictures, read_pictures
from service.cli.bench.sweep import CLIENTS, SHARES


def run(*arguments: object):
    wide = {"COLUMNS": "200"}
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)], env=wide)


def said(result) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout + result.stderr)
    return re.sub(r"[\s│╭╮╰╯─]+", " ", plain)


@pytest.fixture
def classifier(serve_apart, answer):
    """Answers with the mean brightness of the picture as its score; `spoil(number)` spoils an answer."""
    spoilt: set[int] = set()

    async def classify_exception(seen):
        if len(server.seen) in spoilt:
            return answer({"code": "overloaded"}, status=429, seen=seen)
        pixels = Image.open(io.BytesIO(seen.body)).convert("RGB").resize((1, 1)).getpixel((0, 0))
        predictions = [{"class_id": i, "score": float(value)} for i, value in enumerate(pixels)]
        image = {"width": 1, "height": 1}
        return answer({"results": [{"image": image, "predictions": predictions}]}, seen=seen)

    server, url = serve_apart(classify_exception)
    server.spoilt = spoilt
    return server, url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, data in enumerate(draw_pictures(4, size=(60, 40))):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    return tmp_path


def test_closed_loop_to_a_file(classifier, folder: Path, tmp_path: Path) -> None:
    server, url = classifier
    server.spoilt.add(20)
    out = tmp_path / "report.json"
    result = run(
        url, "--clients", 3, "--requests", 40, "--warmup", 0, "--pictures", folder, "--verify",
        "--operation", "predict", "-O", "top_k=3", "--json", out,
    )  # fmt: skip
    assert result.exit_code == 0, said(result)
    assert "3 clients" in said(result)
    assert "1 overloaded" in said(result)
    report = json.loads(out.read_text())
    (row,) = report["runs"]
    assert (report["operation"], report["pictures"]) == ("predict", 4)
    assert (row["answered"], row["failed"], row["codes"]) == (39, 1, {"overloaded": 1})
    assert row["throughput"] > 0
    assert {seen.line for seen in server.seen} == {"POST /v1/predict?top_k=3 HTTP/1.1"}
    assert len(server.seen) == 1 + 4 + 40  # the first look, the answers alone, the load


def test_wrong_answers_make_it_fail(serve_apart, answer, folder: Path) -> None:
    async def changing(seen):
        score = 1.0 if len(server.seen) < 11 else 2.0
        result = {
            "image": {"width": 1, "height": 1},
            "predictions": [{"class_id": 1, "score": score}],
        }
        return answer({"results": [result]}, seen=seen)

    server, url = serve_apart(changing)
    result = run(url, "--requests", 8, "--warmup", 0, "--pictures", folder, "--verify")
    assert result.exit_code == 1
    assert "3 wrong_answer" in said(result)


def test_open_loop_with_drawn_pictures(classifier, monkeypatch) -> None:
    monkeypatch.setattr("service.cli.bench.pictures.DRAWN_SIZE", (64, 48))
    _, url = classifier
    result = run(url, "--rate", 50, "--duration", 0.4, "--warmup", 0.1)
    assert result.exit_code == 0, said(result)
    assert "50.0/s" in said(result)
    assert "64 pictures" in said(result)


def test_the_sweep_finds_its_rates(classifier, folder: Path, tmp_path: Path) -> None:
    _, url = classifier
    out = tmp_path / "sweep.json"
    result = run(
        url, "--sweep", "--duration", 0.2, "--warmup", 0, "--pictures", folder, "--json", out
    )
    assert result.exit_code == 0, said(result)
    rows = json.loads(out.read_text())["runs"]
    assert [row["clients"] for row in rows if row["clients"]] == list(CLIENTS)
    best = max(row["throughput"] for row in rows if row["clients"])
    assert [row["rate"] for row in rows if row["rate"]] == pytest.approx([s * best for s in SHARES])


def test_a_service_that_refuses_is_not_loaded(serve_apart, answer) -> None:
    async def refuse(_seen):
        return answer({"code": "unauthorized"}, status=401)

    server, url = serve_apart(refuse)
    result = run(url)
    assert result.exit_code == 1
    assert "401 unauthorized" in said(result)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["http://192.0.2.7"], "not this machine"),
        (["http://127.0.0.1:9"], "no service that answers"),
        (["http://127.0.0.1:9", "--rate", 1, "--sweep"], "Choose one"),
        (["http://127.0.0.1:9", "-O", "methods"], "NAME=VALUE"),
        (["http://127.0.0.1:9", "--operation", "paint"], "paint"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list, text: str) -> None:
    result = run(*arguments)
    assert result.exit_code in {1, 2}
    assert text in said(result)
    assert "Traceback" not in said(result)


def test_an_empty_folder(classifier, tmp_path: Path) -> None:
    result = run(classifier[1], "--pictures", tmp_path)
    assert result.exit_code == 1
    assert "There is no picture" in said(result)
    with pytest.raises(NoPictures):
        read_pictures(tmp_path)


def test_drawn_pictures_are_different_and_the_same_again() -> None:
    pictures = draw_pictures(5, size=(500, 375))
    assert len(set(pictures)) == 5
    assert pictures == draw_pictures(5, size=(500, 375))
    with Image.open(io.BytesIO(pictures[0])) as picture:
        assert (picture.format, picture.size) == ("JPEG", (500, 375))
    assert 40_000 < len(pictures[0]) < 250_000  # as heavy as photographs of this size
