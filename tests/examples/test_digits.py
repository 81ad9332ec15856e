"""The examples, run as a reader would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import main as cli

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


def train(folder: Path, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "digits" / "train.py", folder, *flags],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.stdout


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_report_names_a_planted_shortcut_first(tmp_path):
    train(tmp_path, "--watermark")
    page = tmp_path / "report.html"
    said = run("report", tmp_path / "images", "-c", tmp_path / "heatlens.toml", "-o", page,
               "--faithfulness", "4")  # fmt: skip
    first = said.split("look closer: ")[1]
    assert first.startswith("In ")
    assert "bottom right" in first.split("look closer")[0]
    assert "“three”" in first.split("look closer")[0]
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert numbers["clusters"][0]["p_errors"] < 1e-6
    assert numbers["accuracy"]["total"] == 450
    html = page.read_text()
    assert 'src="http' not in html
    assert html.count("data:image/jpeg") > 20

    # Nothing is explained twice: the same command again only draws.
    records = page.with_suffix(".records.jsonl")
    before = records.read_bytes()
    run("report", tmp_path / "images", "-c", tmp_path / "heatlens.toml", "-o", page,
        "--faithfulness", "4")  # fmt: skip
    assert records.read_bytes() == before
