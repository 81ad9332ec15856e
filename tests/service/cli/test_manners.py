"""What all commands have in common: JSON, exit codes, colours, completion."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from service.cli import main as cli
from service.cli.common import EXIT_INTERRUPTED, EXIT_SOME_FAILED
from service.cli.files import find_images
from tests.service.cli.running import run, said
from tests.waiting import until

COMMANDS = get_command(cli.app).commands


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"serve"}))
def test_every_command_prints_json(name: str) -> None:
    assert "--json" in {option for row in COMMANDS[name].params for option in row.opts}


def test_compare_as_json(config: Path, images: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    result = run("compare", images / "a.jpg", "-c", config, "-o", sheet, "--json",
                 "-m", "gradcam", "-m", "attention_rollout")  # fmt: skip
    assert result.exit_code == 0, said(result)
    printed = json.loads(result.stdout)
    assert printed["sheet"] == str(sheet)
    assert sheet.is_file()
    assert printed["label"] in {"cat", "dog", "Egyptian cat"}
    able, unable = printed["methods"]
    assert (able["method"], able["degenerate"]) == ("gradcam", False)
    assert able["total_ms"] > 0
    assert unable["code"] == "method_not_applicable"
    assert unable["error"]


def test_report_as_json(config: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labelled"
    for label, image in zip(("cat", "dog", "Egyptian_cat"), find_images([images]), strict=True):
        (folder / label).mkdir(parents=True)
        shutil.copy(image.path, folder / label)
    page = tmp_path / "report.html"
    result = run("report", folder, "-c", config, "-o", page, "--faithfulness", 0, "--json")
    assert result.exit_code == 0, said(result)
    printed = json.loads(result.stdout)
    assert (printed["page"], printed["images"], printed["findings"]) == (str(page), 3, [])
    assert 0 <= printed["accuracy"] <= 1
    assert (
        printed["accuracy"]
        == json.loads(page.with_suffix(".json").read_text())["accuracy"]["value"]
    )


def test_init_as_json(tmp_path: Path) -> None:
    import torch
    from torch import nn

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.body(image)).mean((2, 3)))

    exported = torch.export.export(Half().eval(), (torch.zeros(1, 3, 32, 32),))
    torch.export.save(exported, tmp_path / "half.pt2")
    result = run("init", tmp_path / "half.pt2", "--json")
    assert result.exit_code == 0, said(result)
    printed = json.loads(result.stdout)
    assert printed["config"] == str(tmp_path / "heatlens.toml")
    assert printed["model"]["num_classes"] == 2


def test_failures_are_lines_of_json(config: Path, images: Path, tmp_path: Path) -> None:
    (images / "b.png").write_bytes(b"not an image")
    result = run("explain", images, "-o", tmp_path / "out", "-c", config, "--json")
    assert result.exit_code == EXIT_SOME_FAILED
    lines = {Path(line["image"]).name: line for line in map(json.loads, result.stdout.splitlines())}
    assert lines["b.png"]["code"] == "unsupported_media_type"
    assert lines["b.png"]["error"]
    assert "code" not in lines["a.jpg"]
    assert result.stderr == ""


# ---------------------------------------------------------------- terminal


COLOUR = re.compile(r"\x1b\[([\d;]*;)?(3[0-8]|9[0-7])[;m]")


@pytest.mark.parametrize(("unset", "coloured"), [("NO_COLOR", True), ("", False)])
def test_no_color_is_honoured(unset: str, coloured: bool) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": "1"}
    environment.pop(unset, None)
    done = subprocess.run(
        [sys.executable, "-m", "service", "report", "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert bool(COLOUR.search(done.stdout + done.stderr)) is coloured


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("heatlens comp", {"compare"}),
        ("heatlens report --serv", {"--server"}),
        ("heatlens explain -m score", {"scorecam"}),
    ],
)
def test_the_shell_completes_commands_options_and_methods(line: str, completed: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        env={
            **os.environ,
            "_HEATLENS_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(line.count(" ")),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == completed


# ---------------------------------------------------------------- interruption


LOADING = """
import pathlib
import torch

def build():
    pathlib.Path("loading").touch()
    layer, image = torch.nn.Conv2d(3, 64, 3), torch.rand(2, 3, 64, 64)
    for _ in range(20_000):
        layer(image).sum().backward()
"""


# A shell that runs the tests in the background has them ignore interruptions.
INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("service", run_name="__main__")
"""


@pytest.mark.slow
def test_an_interruption_while_a_model_is_loaded_ends_cleanly(tmp_path: Path) -> None:
    (tmp_path / "loading_net.py").write_text(LOADING)
    entry = '[[models]]\nname = "slow"\nsource = "python:loading_net:build"\n'
    (tmp_path / "heatlens.toml").write_text('[server]\ndevices = ["cpu"]\n' + entry)
    command = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "layers", "-c", "heatlens.toml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stderr=subprocess.PIPE,
        text=True,
    )
    with command:
        try:
            until((tmp_path / "loading").exists, timeout_s=60)
            errors = interrupted(command)
        finally:
            command.kill()
    assert (command.returncode, errors) == (EXIT_INTERRUPTED, "")


def interrupted(command: subprocess.Popen[str]) -> str:
    """Interrupt a command, and again if that came where Python can only ignore it; gives its errors."""
    for _ in range(3):
        command.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return command.communicate(timeout=15)[1]
    raise AssertionError("it does not end")
