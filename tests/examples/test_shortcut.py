"""A planted shortcut is the first thing that the report names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.examples.running import EXAMPLES, python
from tests.service.cli.running import run, said

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(400)]


def test_the_report_names_a_planted_shortcut_first(tmp_path: Path) -> None:
    printed = python(EXAMPLES / "shortcut" / "finetune.py", tmp_path)
    as_trained, signed = re.findall(r": (\d+)% of \d+", printed)
    assert int(as_trained) > 90
    assert int(signed) < 50

    page = tmp_path / "report.html"
    command = ("report", tmp_path / "images", "-c", tmp_path / "heatlens.toml", "-o", page,
               "--faithfulness", 0, "--json")  # fmt: skip
    result = run(*command)
    assert result.exit_code == 0, said(result)
    first = json.loads(result.stdout)["findings"][0]
    assert "bottom right" in first
    assert "“three”" in first
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert numbers["clusters"][0]["p_errors"] < 1e-6
    html = page.read_text()
    assert first in html
    assert html.index(first) < html.index("<h2>Where the model looks")
    assert 'src="http' not in html
    assert html.count("data:image/jpeg") > 20

    # Nothing is explained twice: the same command again only draws.
    records = page.with_suffix(".records.jsonl")
    before = records.read_bytes()
    assert run(*command).exit_code == 0
    assert records.read_bytes() == before
