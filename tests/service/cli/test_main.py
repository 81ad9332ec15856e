"""The command line, end to end in this process: a tiny network, drawn images, real files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.compat import define_missing_operators
from service.cli.common import EXIT_SOME_FAILED, EXIT_UNREACHABLE
from tests.service.cli.running import run, said

BROKEN = """
[[models]]
name = "broken"
source = "torchvision:no_such_network"
weights = "none"
"""


# ---------------------------------------------------------------- explain


def test_explain_writes_overlays_and_numbers(config: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("explain", images, "-o", out, "-c", config, "-m", "gradcam", "-m", "layercam",
                 "-t", "cat", "-t", "Egyptian cat")  # fmt: skip
    assert result.exit_code == 0, said(result)
    overlays = {
        f"{name}.{method}.{label}.jpg"
        for name in "abc"
        for method in ("gradcam", "layercam")
        for label in ("cat", "Egyptian_cat")
    }
    assert {path.name for path in out.iterdir()} == overlays | {"a.json", "b.json", "c.json"}
    with Image.open(out / "a.gradcam.cat.jpg") as overlay:
        assert overlay.size == (32, 32)
    numbers = json.loads((out / "b.json").read_text())
    assert (numbers["image"]["width"], numbers["image"]["height"]) == (40, 64)
    assert sum(row["probability"] for row in numbers["predictions"]) == pytest.approx(1, abs=1e-5)
    assert [row["target"]["class_id"] for row in numbers["explanations"]] == [0, 2, 0, 2]
    assert numbers["statistics"][0]["shape"] == [8, 16, 16]
    assert "a.jpg" in said(result)
    assert "%" in said(result)


def test_json_has_one_line_per_image(config: Path, images: Path, tmp_path: Path) -> None:
    result = run("explain", images, "-o", tmp_path / "out", "-c", config, "--json")
    assert result.exit_code == 0, said(result)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(Path(line["image"]).name for line in lines) == ["a.jpg", "b.png", "c.webp"]
    for line in lines:
        assert len(line["predictions"]) == 3
        assert all(Path(path).is_file() for path in line["overlays"])


@pytest.mark.parametrize("columns", [20, 80])
def test_file_names_are_not_broken_into_lines(
    config: Path, images: Path, tmp_path: Path, columns: int
) -> None:
    long = (images / "a.jpg").rename(images / f"{'long-name-' * 9}.jpg")
    missing = tmp_path / f"{'missing-' * 12}.jpg"
    result = run("explain", long, missing, "-o", tmp_path, "-c", config, "-t", "dog",
                 columns=columns)  # fmt: skip
    lines = (result.stdout + result.stderr).splitlines()
    assert str(long) in lines
    assert f"  {long.stem}.gradcam.dog.jpg" in lines
    assert str(missing) in lines


def test_the_whole_image_as_canvas(config: Path, images: Path, tmp_path: Path) -> None:
    result = run("explain", images / "b.png", "-o", tmp_path, "-c", config, "-t", "dog",
                 "--canvas", "original", "--alpha", "0.3", "--colormap", "viridis")  # fmt: skip
    assert result.exit_code == 0, said(result)
    with Image.open(tmp_path / "b.gradcam.dog.jpg") as overlay:
        assert overlay.size == (40, 64)


def test_a_bad_image_does_not_stop_the_others(config: Path, images: Path, tmp_path: Path) -> None:
    (images / "b.png").write_bytes(b"not an image")
    missing = tmp_path / "missing.jpg"
    out = tmp_path / "out"
    result = run("explain", missing, images, "-o", out, "-c", config)
    assert result.exit_code == EXIT_SOME_FAILED
    assert {path.name for path in out.glob("*.json")} == {"a.json", "c.json"}
    failures = said(result)
    assert "unsupported_media_type" in failures
    assert "unreadable" in failures
    assert "b.png" in failures
    assert "missing.jpg" in failures


@pytest.mark.parametrize(
    ("arguments", "flag", "hint"),
    [
        (("-m", "gradcan"), "--method", "gradcam"),
        (("-t", "zebra"), "--target", "label"),
        (("-t", "17"), "--target", "2"),
        (("-l", "nowhere"), "--layer", "layer"),
        (("--colormap", "pink"), "--colormap", "turbo"),
        (("--clip", "0.5"), "--clip", "0.1"),
        (("--canvas", "wall"), "--canvas", "original"),
        (("--alpha", "7"), "--alpha", "at most 1"),
        (("--model", "nobody"), "--model", "tiny@1"),
    ],
)
def test_wrong_options_say_what_is_allowed(
    config: Path, images: Path, arguments: tuple[str, str], flag: str, hint: str
) -> None:
    result = run("explain", images, "-o", images / "out", "-c", config, *arguments)
    assert result.exit_code == 2
    assert flag in said(result)
    assert hint in said(result)
    assert "Traceback" not in said(result)
    assert not list((images / "out").glob("*"))


def test_a_folder_without_images(tmp_path: Path) -> None:
    result = run("explain", tmp_path)
    assert result.exit_code == 2
    assert "no images" in said(result)


def test_a_broken_model_says_why(config: Path, images: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text() + BROKEN)
    result = run("explain", images, "-o", tmp_path, "-c", config, "--model", "broken")
    assert result.exit_code == 2
    assert "could not be loaded" in said(result)
    assert "no_such_network" in said(result)


def test_the_same_command_again_takes_up_where_it_stopped(
    config: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("explain", images / "a.jpg", "-o", out, "-c", config, "-t", "cat")
    (out / "a.gradcam.cat.jpg").write_bytes(b"kept")
    again = run("explain", images, "-o", out, "-c", config, "-t", "cat")
    assert again.exit_code == 0, said(again)
    assert "1 of them before" in said(again)
    assert (out / "a.gradcam.cat.jpg").read_bytes() == b"kept"
    assert (out / "c.gradcam.cat.jpg").is_file()
    other = run("explain", images, "-o", out, "-c", config, "-t", "cat", "--alpha", "0.3")
    assert "before" not in said(other)
    assert (out / "a.gradcam.cat.jpg").read_bytes() != b"kept"


def test_a_service_that_does_not_run(images: Path, tmp_path: Path) -> None:
    result = run("explain", images, "-o", tmp_path, "--server", "http://127.0.0.1:9")
    assert result.exit_code == EXIT_UNREACHABLE
    assert "heatlens serve" in said(result)


# ---------------------------------------------------------------- models, check, layers, serve


def test_check_names_the_line_of_a_wrong_key(config: Path) -> None:
    text = config.read_text().replace("num_classes = 3", 'num_classes = "three"')
    config.write_text(text)
    line = text.splitlines().index('num_classes = "three"') + 1
    result = run("check", config)
    assert result.exit_code == 2
    assert f"line {line}: models.0.num_classes" in said(result)


def test_check_names_the_line_of_a_model_that_does_not_load(config: Path) -> None:
    config.write_text(config.read_text() + BROKEN)
    result = run("check", config)
    assert result.exit_code == EXIT_SOME_FAILED
    line = config.read_text().splitlines().index('name = "broken"')
    assert f":{line}: broken could not be loaded" in said(result)
    assert "tiny@1" in said(result)


def test_layers_tell_which_one_is_recommended(config: Path) -> None:
    result = run("layers", "-c", config, "--json")
    assert result.exit_code == 0, said(result)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["name"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["name"] for row in rows if row["recommended"]] == ["1"]
    assert "recommended" in said(run("layers", "-c", config))


def test_models_lists_what_was_found(config: Path) -> None:
    result = run("models", "-c", config)
    assert result.exit_code == 0, said(result)
    assert "tiny@1" in said(result)
    assert "32 x 32" in said(result)


def test_models_says_what_is_broken(config: Path) -> None:
    config.write_text(config.read_text() + BROKEN)
    result = run("models", "-c", config, "--json")
    assert result.exit_code == EXIT_SOME_FAILED
    cards = {card["name"]: card for card in map(json.loads, result.stdout.splitlines())}
    assert cards["tiny"]["ready"]
    assert cards["tiny"]["num_classes"] == 3
    assert not cards["broken"]["ready"]
    assert "no_such_network" in cards["broken"]["reason"]


def test_the_operator_reads_what_the_factory_raised(config: Path) -> None:
    (config.parent / "failing_net.py").write_text("def build():\n    raise OSError('no disk')\n")
    entry = '[[models]]\nname = "raises"\nsource = "python:failing_net:build"\n'
    config.write_text(config.read_text() + entry)
    result = run("models", "-c", config)
    assert result.exit_code == EXIT_SOME_FAILED
    assert "OSError: no disk (failing_net.py:2)" in said(result)


def test_serve_passes_its_options_on(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Supervisor:
        def __init__(self, settings: object, *, source: object) -> None:
            seen.extend([settings, source])

        def run(self) -> int:
            return 7

    monkeypatch.setattr("service.supervisor.supervisor.Supervisor", Supervisor)
    monkeypatch.setattr("service.logs.configure_logging", seen.append)
    result = run("serve", "-c", config, "--port", "9001", "--devices", "cpu:0,cpu:1",
                 "--http-workers", "3", "--log-level", "warning")  # fmt: skip
    assert result.exit_code == 7
    level, settings, source = seen
    assert level == "warning"
    assert source.read() == settings, "a reload forgets the options of the command line"
    assert source.path == config.absolute()
    assert settings.server.port == 9001
    assert settings.server.devices == ["cpu:0", "cpu:1"]
    assert settings.server.http_workers == 3
    assert settings.default_model == "tiny"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--log-level", "loud"), "warning"),
        (("--http-workers", "many"), "http_workers"),
        (("--port", "70000"), "65535"),
        (("--config", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_serve_refuses_what_is_wrong(arguments: tuple[str, str], hint: str) -> None:
    result = run("serve", *arguments)
    assert result.exit_code == 2
    assert hint in said(result)


def test_a_wrong_config_names_the_key(tmp_path: Path) -> None:
    config = tmp_path / "heatlens.toml"
    config.write_text("[limits]\nmax_imagess = 3\n")
    result = run("models", "-c", config)
    assert result.exit_code == 2
    assert "limits.max_imagess" in said(result)


def test_python_dash_m_service_is_heatlens_and_imports_little() -> None:
    program = (
        "import runpy, sys; sys.argv = ['service', '--version']\n"
        "try: runpy.run_module('service', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'fastapi', 'aiohttp'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"heatlens \d+\.\d+\.\d+\S*\n", done.stdout)


# ---------------------------------------------------------------- init


def test_init_writes_a_configuration_that_serves(tmp_path: Path) -> None:
    define_missing_operators()
    import timm

    network = timm.create_model("test_resnet", num_classes=7)
    weights = tmp_path / "parts.pth"
    torch.save({"state_dict": network.state_dict(), "arch": "test_resnet"}, weights)
    result = run("init", weights)
    assert result.exit_code == 0, said(result)
    written = tmp_path / "heatlens.toml"
    text = written.read_text()
    assert 'name = "parts"' in text
    assert "# num_classes = 7" in text
    assert "# target_layer = " in text
    checked = run("models", "-c", written, "--json")
    assert json.loads(checked.stdout)["num_classes"] == 7
    again = run("init", weights)
    assert again.exit_code == 2
    assert "--force" in said(again)


def test_init_of_what_is_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_bytes(b"no weights")
    result = run("init", tmp_path / "notes.pth")
    assert result.exit_code == EXIT_SOME_FAILED
    assert "could not be loaded" in said(result)
    assert "--source" in said(result)
    assert not (tmp_path / "heatlens.toml").exists()
