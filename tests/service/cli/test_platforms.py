"""What platforms hand to the container: arguments, mounted folders, variables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from models.catalog import DEFAULT_MODEL
from service.cli import main as cli
from service.cli import platforms
from service.settings import Settings

CONFIG = '[limits]\nmax_images = 3\n[[models]]\nname = "defects"\nsource = "timm:resnet10t"\n'
KSERVE = ("--model_name", "cats", "--predictor_host", "cats.default", "--http_port", "8080")

Serve = Callable[..., tuple[Result, Settings | None]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Serve:
    """Runs `heatlens` with a supervisor that only notes its settings."""
    monkeypatch.setattr(platforms, "MOUNTED", (tmp_path / "mounted", tmp_path / "opt"))
    monkeypatch.setattr("service.logs.configure_logging", lambda level: None)
    seen: list[Settings] = []

    class Supervisor:
        def __init__(self, settings: Settings, *, source: Any) -> None:
            assert source.read() == settings, "a reload forgets what the platform said"
            seen.append(settings)

        def run(self) -> int:
            return 0

    monkeypatch.setattr("service.supervisor.supervisor.Supervisor", Supervisor)

    def serve(*arguments: object, **variables: str) -> tuple[Result, Settings | None]:
        result = CliRunner().invoke(
            cli.app, list(map(str, arguments)), env={"COLUMNS": "400", **variables}
        )
        assert (result.exit_code == 0) == bool(seen), result.output
        return result, seen.pop() if seen else None

    return serve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that a platform mounts, still empty."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    return folder


# ---------------------------------------------------------------- arguments


def test_kserve_appends_its_arguments_in_place_of_the_command(serve: Serve) -> None:
    _, settings = serve(*KSERVE, "--workers", "2")
    assert settings.server.port == 8080
    assert settings.server.http_workers == 2
    assert [spec.name for spec in settings.models] == ["cats"]
    assert settings.default_model == "cats"
    assert settings.models[0].source == f"embedded:{DEFAULT_MODEL}"


def test_serve_is_what_sagemaker_says(serve: Serve, folder: Path) -> None:
    folder.rename(folder.with_name("opt")).joinpath("heatlens.toml").write_text(CONFIG)
    _, settings = serve("serve", HEATLENS_SERVER__PORT="8080")
    assert settings.server.port == 8080
    assert settings.default_model == "defects"


@pytest.mark.parametrize("own", [("--version",), ("--help",), ("-h",), ("models", "--help")])
def test_own_options_and_commands_do_not_serve(own: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, own)
    assert result.exit_code == 0
    assert "predictor_host" not in result.output


def test_the_one_model_of_a_configuration_takes_the_name(serve: Serve, folder: Path) -> None:
    (folder / "heatlens.toml").write_text(CONFIG)
    _, settings = serve("--model_dir", folder, "--model_name=cats")
    (spec,) = settings.models
    assert (spec.name, spec.source, settings.base_dir) == ("cats", "timm:resnet10t", folder)
    assert settings.limits.max_images == 3


def test_a_name_chooses_among_several_models(serve: Serve, tmp_path: Path) -> None:
    config = tmp_path / "two.toml"
    config.write_text(CONFIG + '[[models]]\nname = "cats"\nsource = "timm:resnet10t"\n')
    _, settings = serve("-c", config, "--model_name", "cats")
    assert settings.default_model == "cats"
    assert len(settings.models) == 2
    result, _ = serve("-c", config, "--model_name", "dogs")
    assert result.exit_code == 2
    assert "defects, cats" in result.output


# ---------------------------------------------------------------- folders


def test_a_configuration_that_is_mounted_is_read(serve: Serve, folder: Path) -> None:
    (folder / "heatlens.toml").write_text(CONFIG)
    _, settings = serve()[1], serve("serve")[1]
    assert settings.default_model == "defects"
    assert settings.base_dir == folder


def test_an_explicit_configuration_wins_over_a_mounted_one(
    serve: Serve, folder: Path, tmp_path: Path
) -> None:
    (folder / "heatlens.toml").write_text(CONFIG)
    own = tmp_path / "own.toml"
    own.write_text(CONFIG.replace("defects", "own"))
    assert serve("-c", own)[1].default_model == "own"


def test_an_empty_mount_leaves_the_default_model(serve: Serve, folder: Path) -> None:
    assert serve("serve")[1].default_model == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("files", "source"),
    [
        ({"config.json": '{"model_type": "vit"}', "model.safetensors": ""}, "transformers:."),
        ({"config.json": '{"architecture": "resnet18"}', "model.safetensors": ""}, "timm:."),
        ({"net.pt2": ""}, "export:net.pt2"),
        ({"net.onnx": "", "notes.md": ""}, "onnx:net.onnx"),
        ({"resnet50-0676ba61.pth": ""}, "checkpoint:resnet50-0676ba61.pth"),
        ({"config.json": "[", "last.ckpt": ""}, "checkpoint:last.ckpt"),
    ],
)
def test_what_lies_in_the_folder_is_served(
    serve: Serve, folder: Path, files: dict[str, str], source: str
) -> None:
    for name, text in {**files, "labels.txt": "a\nb\n"}.items():
        (folder / name).write_text(text)
    _, settings = serve("--model_name", "cats")
    (spec,) = settings.models
    assert (spec.name, spec.source, spec.labels) == ("cats", source, Path("labels.txt"))
    assert settings.base_dir == folder


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({"notes.md": "x"}, "found: none"),
        ({"a.pth": "x", "b.safetensors": "x"}, "a.pth, b.safetensors"),
    ],
)
def test_a_folder_that_says_too_little_names_the_cure(
    serve: Serve, folder: Path, files: dict[str, str], hint: str
) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    result, _ = serve("--model_dir", folder)
    assert result.exit_code == 2
    assert hint in result.output
    assert "heatlens.toml" in result.output


# ---------------------------------------------------------------- Vertex AI


def test_vertex_names_port_and_routes(serve: Serve) -> None:
    _, settings = serve(
        "serve",
        AIP_HTTP_PORT="8085",
        AIP_HEALTH_ROUTE="/v1/endpoints/1/deployedModels/2",
        AIP_PREDICT_ROUTE="/v1/endpoints/1/deployedModels/2:predict",
    )
    assert settings.server.port == 8085
    assert settings.server.aliases == {
        "/v1/endpoints/1/deployedModels/2": "/readyz",
        "/v1/endpoints/1/deployedModels/2:predict": f"/v1/models/{DEFAULT_MODEL}:predict",
    }


def test_routes_of_vertex_that_are_ours_stay_what_they_are(serve: Serve) -> None:
    route = f"/v1/models/{DEFAULT_MODEL}:explain"
    _, settings = serve("serve", AIP_HEALTH_ROUTE="/health", AIP_PREDICT_ROUTE=route)
    assert settings.server.aliases == {"/health": "/readyz"}


def test_the_command_line_wins_over_vertex(serve: Serve) -> None:
    assert serve("--port", "9000", AIP_HTTP_PORT="8085")[1].server.port == 9000


def test_a_wrong_port_of_vertex_is_named(serve: Serve) -> None:
    result, _ = serve("serve", AIP_HTTP_PORT="http")
    assert result.exit_code == 2
    assert "server.port" in result.output
