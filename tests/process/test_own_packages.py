"""A project with its own `models` and `service` files next to the configuration."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_engine import image_of
from traffic import png

from tests.waiting import answers, until

pytestmark = [pytest.mark.process, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
NETWORK = """
from torch import nn

def build():
    from models.parts import head
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head())
"""
CONFIG = """
[server]
port = 0
devices = ["cpu"]
[[models]]
name = "mine"
source = "python:models.net:build"
weights = "none"
"""


@pytest.fixture
def project() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hl-", dir="/tmp"))  # pytest's own is too long
    files = {
        "models/__init__.py": "",
        "models/net.py": NETWORK,
        "models/parts.py": "from torch import nn\n\ndef head():\n    return nn.Linear(4, 3)\n",
        "service.py": "raise SystemExit('the file of the project was imported')\n",
        "heatlens.toml": CONFIG,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    yield folder
    shutil.rmtree(folder)


def wheel_installed(folder: Path) -> Path:
    """Build a wheel, install it into a folder of its own, and return its command."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "__pycache__")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("models", "service"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=100)
    (wheel,) = folder.glob("heatlens-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.mark.parametrize("installed", ["editable", "wheel"])
def test_the_project_and_the_service_do_not_shadow_each_other(
    project: Path, tmp_path: Path, installed: str
) -> None:
    environment = os.environ | {"TMPDIR": str(project)}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-m", "service"]
    if installed == "wheel":
        # The folder of the wheel comes before the editable install, for the children, too.
        environment["PYTHONPATH"] = str(wheel_installed(tmp_path))
    process = subprocess.Popen(
        [*command, "serve", "--config", "heatlens.toml"],
        cwd=project,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                break
        url = f"http://127.0.0.1:{found[1]}"
        os.set_blocking(process.stderr.fileno(), False)

        def is_ready() -> bool:
            lines.extend(process.stderr)
            assert process.poll() is None, "".join(lines)
            return answers(f"{url}/readyz")

        until(is_ready, timeout_s=90, every_s=0.05)
        answer = httpx.post(
            f"{url}/v1/explain", content=png(image_of(1)), trust_env=False, timeout=30
        )
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["results"][0]["predictions"]) == 3
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stderr.close()
    assert "the file of the project was imported" not in "".join(lines)
