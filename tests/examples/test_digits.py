"""A network of one's own: trained, checked, explained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.examples.running import EXAMPLES, python
from tests.service.cli.running import run, said

pytestmark = pytest.mark.slow


def test_a_network_is_trained_checked_and_explained(tmp_path: Path) -> None:
    printed = python(EXAMPLES / "digits" / "train.py", tmp_path)
    accuracy = re.search(r"test images: ([\d.]+)%", printed)
    assert accuracy
    assert float(accuracy[1]) > 90
    config = tmp_path / "heatlens.toml"
    checked = run("check", config, "--json")
    assert checked.exit_code == 0, said(checked)
    assert json.loads(checked.stdout)["num_classes"] == 10
    image = next((tmp_path / "images" / "seven").iterdir())
    explained = run("explain", image, "-c", config, "-o", tmp_path / "out", "--json")
    assert explained.exit_code == 0, said(explained)
    printed = json.loads(explained.stdout)
    assert printed["predictions"][0]["label"] == "seven"
    assert Path(printed["overlays"][0]).is_file()
