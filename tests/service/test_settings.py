"""Settings and their sources: precedence, clear errors, secrets, reloads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from models.catalog import DEFAULT_MODEL
from service.configuration import (
    ConfigurationError,
    ConfigurationSource,
    line_of,
    load_settings,
    reloaded,
)
from service.hardware import available_cores
from service.settings import Settings

CONFIG = """
default_model = "b"
[server]
port = 9000
devices = ["cpu:0", "cpu:1"]
[limits]
max_images = 4
[security]
api_keys = ["open sesame"]
[[models]]
name = "a"
source = "timm:resnet10t"
[[models]]
name = "b"
version = 2
source = "torchvision:resnet18"
weights = "weights/b.safetensors"
[models.preprocess]
crop = 96
"""


@pytest.fixture(autouse=True)
def set_variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets variables of the process, which has none of ours at first."""

    def set_all(**variables: str) -> None:
        for name in [name for name in os.environ if name.startswith("HEATLENS_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_all()
    return set_all


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "conf" / "heatlens.toml"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


def wrong(**kwargs: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**kwargs)
    return str(caught.value)


def test_nothing_configured_is_the_embedded_model() -> None:
    settings = load_settings()
    assert settings.default_model == DEFAULT_MODEL
    assert [spec.name for spec in settings.models] == [DEFAULT_MODEL]
    assert settings.limits.max_body_bytes == 20_000_000
    assert settings.limits.max_image_bytes == 10_000_000
    assert settings.limits.max_images == 32
    assert settings.limits.timeout_s == 30
    assert settings.security.api_keys == []
    assert settings.base_dir == Path.cwd()


def test_file(config: Path) -> None:
    settings = load_settings(config)
    assert settings.default_model == "b"
    assert settings.server.port == 9000
    assert settings.models[1].version == "2"
    assert settings.models[1].preprocess.crop == 96
    assert settings.base_dir == config.parent


def test_arguments_beat_environment_beats_file(
    config: Path, set_variables: Callable[..., None]
) -> None:
    set_variables(
        HEATLENS_SERVER__PORT="9001",
        HEATLENS_LIMITS__MAX_IMAGES="5",
        HEATLENS_SERVER__DEVICES="cuda:0, cuda:1",
        HEATLENS_SECURITY__CORS_ORIGINS='["https://a.example"]',
        HEATLENS_DEFAULT_MODEL="a",
    )
    settings = load_settings(config, overrides={"server": {"port": 9002}})
    assert settings.server.port == 9002
    assert settings.limits.max_images == 5
    assert settings.server.devices == ["cuda:0", "cuda:1"]
    assert settings.security.cors_origins == ["https://a.example"]
    assert settings.default_model == "a"


def test_models_from_the_environment(set_variables: Callable[..., None]) -> None:
    set_variables(HEATLENS_MODELS='[{"name": "x", "source": "timm:resnet10t"}]')
    settings = load_settings()
    assert (settings.default_model, settings.models[0].source) == ("x", "timm:resnet10t")
    set_variables(HEATLENS_MODELS="", HEATLENS_DEFAULT_MODEL="")
    assert load_settings().default_model == DEFAULT_MODEL


def test_variables_of_an_orchestrator_do_no_harm(set_variables: Callable[..., None]) -> None:
    set_variables(HEATLENS_PORT="tcp://10.0.0.1:8000", HEATLENS_SERVICE_HOST="10.0.0.1")
    assert load_settings().server.port == 8000


def test_broken_json_in_the_environment_is_named(set_variables: Callable[..., None]) -> None:
    set_variables(HEATLENS_MODELS='[{"name"')
    assert "models: A list is JSON" in wrong()
    set_variables(HEATLENS_SECURITY='{"api_keys": "hunter2"')
    assert '"security"' in wrong()
    assert "hunter2" not in wrong()


def test_a_removed_section_names_its_replacement(
    config: Path, set_variables: Callable[..., None]
) -> None:
    config.write_text("[metrics]\nnv_aliases = true")
    assert "metrics: metrics.nv_aliases was removed" in wrong(config=config)
    set_variables(HEATLENS_METRICS__NV_ALIASES="true")
    assert "deploy/prometheus/triton.yml" in wrong()


def test_unknown_keys_are_named(config: Path, set_variables: Callable[..., None]) -> None:
    assert "limits.max_image: unknown key; did you mean max_images?" in wrong(
        overrides={"limits": {"max_image": 1}}
    )
    assert "models.0.wieghts: unknown key; did you mean weights?" in wrong(
        overrides={"models": [{"name": "a", "source": "timm:x", "wieghts": "w"}]}
    )
    set_variables(HEATLENS_LIMITS__NOPE="1")
    assert "limits.nope: unknown key" in wrong()
    set_variables(HEATLENS_LIMIT__NOPE="1")
    assert "HEATLENS_LIMIT__NOPE" in wrong()
    set_variables()
    config.write_text("serve = 1")
    assert "serve: unknown key" in wrong(config=config)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"limits": {"max_images": 0}}, "limits.max_images"),
        ({"server": {"port": 70_000}}, "server.port"),
        ({"server": {"devices": []}}, "server.devices"),
        ({"server": {"http_workers": "some"}}, "server.http_workers"),
        ({"models": [3]}, "models.0"),
        ({"models": "[{"}, "models"),
        ({"models": [{"name": "a/b", "source": "timm:x"}]}, "models.0.name"),
        ({"default_model": "nope"}, "default_model: must be one of: efficientnet_lite0"),
        ({"models": [{"name": "a", "source": "timm:x"}] * 2}, "a@1 is configured twice"),
    ],
)
def test_wrong_values_are_named(overrides: dict[str, object], key: str) -> None:
    assert key in wrong(overrides=overrides)


def test_unreadable_files(tmp_path: Path) -> None:
    assert "missing.toml is not a file" in wrong(config=tmp_path / "missing.toml")
    assert "is not a file" in wrong(config=tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("a = = 1")
    assert "not valid TOML" in wrong(config=broken)
    broken.write_bytes(b"\xff\xfe")
    assert "not valid TOML" in wrong(config=broken)


def test_keys_are_kept_as_digests_only(config: Path) -> None:
    digest = "sha256:" + hashlib.sha256(b"open sesame").hexdigest()
    settings = load_settings(config)
    assert settings.security.api_keys == [digest]
    assert "open sesame" not in repr(settings) + settings.model_dump_json()
    again = load_settings(overrides={"security": {"api_keys": [digest.upper()[6:]]}})
    assert again.security.api_keys != [digest]
    assert Settings(security={"api_keys": [digest]}).security.api_keys == [digest]


def test_errors_do_not_repeat_a_key() -> None:
    text = wrong(overrides={"security": {"api_keys": ["sha256:hunter2"]}})
    assert "security.api_keys.0" in text
    assert "hunter2" not in text


def test_travels_as_json(config: Path) -> None:
    settings = load_settings(config)
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_environment_is_not_read_behind_the_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEATLENS_LIMITS__MAX_IMAGES", "7")
    assert Settings().limits.max_images == 32
    assert load_settings().limits.max_images == 7


def test_http_workers() -> None:
    assert Settings(server={"http_workers": 3}).server.http_worker_count() == 3
    assert 1 <= Settings().server.http_worker_count() <= 8


def test_cores_respect_the_container(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    unlimited = available_cores(tmp_path / "none")
    quota.write_text("100000 100000")
    assert available_cores(quota) == 1
    quota.write_text("50000 100000")
    assert available_cores(quota) == 1
    quota.write_text("max 100000")
    assert available_cores(quota) == unlimited


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "cuda:", "cpu:0:1", "CPU"])
def test_a_device_that_there_is_not_is_refused_with_those_that_there_are(name):
    with pytest.raises(ConfigurationError, match="cpu, cpu:N, cuda and cuda:N") as caught:
        load_settings(overrides={"server": {"devices": ["cpu:0", name]}})
    assert "devices" in str(caught.value)


# ---------------------------------------------------------------- reading again


def test_a_source_travels_and_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "heatlens.toml"
    path.write_text("[limits]\nmax_images = 4\n")
    source = ConfigurationSource(path=path, overrides={"server": {"port": 9000}})
    there = ConfigurationSource.model_validate_json(source.model_dump_json())
    assert there.read() == source.read()
    assert there.read().server.port == 9000
    assert there.read().limits.max_images == 4
    path.write_text("[limits]\nmax_images = 5\n[server]\nport = 1\n")
    assert there.read().limits.max_images == 5
    assert there.read().server.port == 9000, "the command line still wins"


def test_what_is_taken_over() -> None:
    running = Settings()
    read = Settings(
        limits={"max_images": 4, "timeout_s": 5},
        security={"api_keys": ["k"]},
        server={"grace_s": 3, "log_level": "debug", "ready_within_s": 7},
        models=[{"name": "m", "source": "timm:resnet10t"}],
    )
    taken, late = reloaded(running, read)
    assert taken == read
    assert late == ()


def test_what_has_to_wait() -> None:
    running = Settings()
    read = Settings(
        server={"host": "::1", "port": 1, "http_workers": 3, "devices": ["cpu:7"], "grace_s": 3},
        limits={"max_wait_s": 1, "max_images": 4},
        workers={"threads": 3},
        tracing={"enabled": True},
        base_dir="/elsewhere",
    )
    taken, late = reloaded(running, read)
    assert set(late) == {
        "server.host",
        "server.port",
        "server.http_workers",
        "server.devices",
        "limits.max_wait_s",
        "workers",
        "tracing",
        "base_dir",
    }
    assert taken.server == running.server.model_copy(update={"grace_s": 3.0})
    assert taken.limits == running.limits.model_copy(update={"max_images": 4})
    assert (taken.workers, taken.tracing) == (running.workers, running.tracing)
    assert taken.base_dir == running.base_dir


TOML = """\
default_model = "a"

[limits]
max_images = 3

[[models]]
name = "a"
preprocess.crop = 32

[[models]]
name = "b"

[models.preprocess]
crop = 64
"""


@pytest.mark.parametrize(
    ("location", "line"),
    [
        (("default_model",), 1),
        (("limits", "max_images"), 4),
        (("limits", "absent"), 3),
        (("models", 0, "name"), 7),
        (("models", 0, "preprocess", "crop"), 8),
        (("models", 1), 10),
        (("models", 1, "preprocess", "crop"), 14),
        (("models", 1, "preprocess", "resize"), 13),
        (("models", 2, "name"), None),
        (("absent",), None),
    ],
)
def test_a_key_has_its_line(location, line):
    assert line_of(TOML, location) == line


def test_keys_can_be_required():
    with pytest.raises(ValidationError, match="api_keys are required"):
        Settings(security={"require_keys": True})
    with pytest.raises(ValidationError, match="api_keys are required"):
        Settings(security={"require_keys": True, "admin_keys": ["a"]})
    assert Settings(security={"require_keys": True, "api_keys": ["a"]}).security.api_keys
