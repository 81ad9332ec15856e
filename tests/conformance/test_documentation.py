"""Every example of `docs/protocols.md` runs, and says something."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from expected import Service

pytestmark = pytest.mark.conformance
pytest.importorskip("kserve", exc_type=ImportError)

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "protocols.md").read_text()
EXAMPLES = re.findall(r"```(console|python)\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) == 9


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example(service: Service, png: bytes, tmp_path: Path, number: int) -> None:
    (tmp_path / "cat.png").write_bytes(png)
    language, text = EXAMPLES[number]
    text = text.replace("localhost:8000", service.http).replace("localhost:8001", service.grpc)
    if language == "python":
        commands = [[sys.executable, "-c", text]]
    else:
        lines = [line.removeprefix("$ ") for line in text.splitlines()]
        commands = [["bash", "-c", line.replace("curl -s", "curl -sf")] for line in lines]
    for command in commands:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        made = [path for path in tmp_path.iterdir() if path.name != "cat.png"]
        assert done.stdout.strip() or any(path.stat().st_size > 100 for path in made)
