"""Every snippet of the README and the documentation runs, against a real service.

Console and Python blocks of a page run in order, in a folder with `cat.jpg` and a few `photos`. A
block that is followed by `<!-- not run: reason -->` is left out. TOML blocks are the configuration of
the page's own service, whose weights are random.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.models.sources.clip import saved
from tests.waiting import answers, until

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "docs" / "images" / "chelsea.jpg"
DEFAULT_URL = "http://127.0.0.1:8000"
PAGES = [
    "README.md",
    "docs/api.md",
    "docs/performance.md",
    "docs/tutorial.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs/how-to").glob("*.md")),
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs/explanation").glob("*.md")),
]
BLOCK = re.compile(
    r"^```(?P<language>console|python|toml)\n(?P<code>.*?)^```\n(?P<skip><!-- not run: [^>]+ -->)?",
    re.MULTILINE | re.DOTALL,
)

pytestmark = [pytest.mark.process, pytest.mark.real]


class Block(NamedTuple):
    language: str
    code: str


def blocks_of(page: str) -> list[Block]:
    found = BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))
    return [Block(match["language"], match["code"]) for match in found if not match["skip"]]


@pytest.fixture(scope="module")
def default_url(tmp_path_factory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("service") / "log") as url:
        yield url


@contextlib.contextmanager
def serving(log: Path, *options: str) -> Iterator[str]:
    """The address of a service; its configuration is among the options of its command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--devices", "cpu"]
    command += options
    with log.open("w") as stream:
        service = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
    try:
        url = f"http://127.0.0.1:{port}"
        ready = f"{url}/readyz"
        until(lambda: answers(ready) or service.poll() is not None, timeout_s=90, every_s=0.1)
        assert service.poll() is None, log.read_text()
        yield url
    finally:
        service.terminate()
        service.wait(30)


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copy(SAMPLE, tmp_path / "cat.jpg")
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("one.jpg", "two.jpg"):
        shutil.copy(SAMPLE, photos / name)
    (tmp_path / "labels.csv").write_text("file,class_id\none.jpg,285\ntwo.jpg,281\n")
    return tmp_path


def test_the_batch_example_runs(default_url, folder):
    (folder / "photos" / "broken.jpg").write_bytes(b"no image")
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "batch.py", "photos", "out"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HEATLENS_URL": default_url},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "2 of 3 explained" in done.stdout
    broken, *rows = (folder / "out" / "table.csv").read_text().splitlines()[1:]
    assert broken.startswith("broken.jpg,,,,,")
    assert "[unsupported_media_type]" in broken
    assert [row.split(",")[0] for row in rows] == ["one.jpg", "two.jpg"]
    assert {path.name for path in (folder / "out").iterdir()} == {"one.jpg", "two.jpg", "table.csv"}


def test_pages_have_snippets():
    assert sum(bool(blocks_of(page)) for page in PAGES) >= 8


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_the_snippets_of_a_page_run(page, folder, request):
    configuration = "".join(b.code for b in blocks_of(page) if b.language == "toml")
    if not configuration:
        return run_snippets(page, folder, request.getfixturevalue("default_url"))
    config = folder / "heatlens.toml"
    saved(folder / "clip")
    # Small images: the networks are proved anew, which takes half a minute at their own size.
    small = 'preprocess = { mode = "squash", crop = 128 }\nsource = "'
    for library in ("torchvision", "timm"):
        configuration = configuration.replace(f'source = "{library}:', f"{small}{library}:")
    config.write_text(configuration.replace("source =", 'weights = "none"\nsource ='))
    with serving(folder / "log", "--config", str(config)) as url:
        return run_snippets(page, folder, url)


def run_snippets(page: str, folder: Path, url: str) -> None:
    binaries = folder / "bin"
    binaries.mkdir()
    heatlens = binaries / "heatlens"
    heatlens.write_text(f'#!/bin/sh\nexec {sys.executable} -m service "$@"\n')
    heatlens.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    blocks = blocks_of(page)
    console = "".join(b.code for b in blocks if b.language == "console")
    # curl says with its exit code that an answer is an error.
    console = console.replace("curl ", "curl --fail --silent --show-error ")
    python = "\n".join(b.code for b in blocks if b.language == "python")
    for command, code in (
        (["bash", "-e", "-c"], console),
        ([sys.executable, "-W", "error", "-c"], python),
    ):
        if not code:
            continue
        done = subprocess.run(
            [*command, code.replace(DEFAULT_URL, url)],
            cwd=folder,
            env=environment,
            capture_output=True,
            check=False,
            text=True,
            timeout=110,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
