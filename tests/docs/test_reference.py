"""The documentation is complete: reference pages equal the code, and the site builds strictly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quality import END, START
from tools.reference import FOLDER, PAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_those_of_the_code(name):
    written = (FOLDER / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), "run: python -m tools.reference"


def test_every_setting_and_option_says_what_it_means():
    undocumented = [
        line
        for name in ("options.md", "settings.md", "metrics.md", "errors.md")
        for line in (FOLDER / name).read_text().splitlines()
        if line.startswith("| `") and line.endswith("|  |")
    ]
    assert not undocumented


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tutorial" / "index.html").is_file()


def test_the_quality_of_methods_has_its_place():
    text = (ROOT / "docs" / "methods.md").read_text()
    assert text.count(START) == text.count(END) == 1
    assert text.index(START) < text.index(END)


def test_pictures_are_small():
    pictures = [*(ROOT / "docs" / "images").iterdir()]
    assert len(pictures) > 2
    assert all(picture.stat().st_size < 300_000 for picture in pictures)
