"""What manifests and pages call by name exists: metrics, settings, flags, routes, files, values."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Match

from models.catalog import ModelSpec
from service.api.app import create_app
from service.settings import Settings
from tests.deploy.manifests import CHART, ROOT
from tests.deploy.test_manifests import KNOWN_FLAGS
from tests.fakes import FakePool

PAGES = [
    ROOT / "docs" / name for name in ("deploy.md", "migrate-from-torchserve.md", "operations.md")
]
MANIFESTS = [
    *(
        path
        for path in sorted((ROOT / "deploy").rglob("*"))
        if path.suffix in {".yml", ".yaml", ".json", ".tpl"}
    ),
    ROOT / "docker-compose.yml",
]
FILES = [*PAGES, *MANIFESTS, ROOT / "Dockerfile", ROOT / "deploy/image/check.py"]

texts = {path: path.read_text() for path in FILES}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


async def exposed() -> set[str]:
    """Names of all samples that the service exposes."""
    app = create_app(Settings(), FakePool())
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):
        await client.get("/readyz")
        families = text_string_to_metric_families((await client.get("/metrics")).text)
        return {
            name
            for family in families
            for suffix in ("", "_total", "_bucket", "_sum", "_count", "_info")
            for name in (family.name, family.name + suffix)
        }


@every_file
@pytest.mark.anyio
async def test_metrics_exist(path: Path) -> None:
    adapter = yaml.safe_load((ROOT / "deploy/prometheus/adapter.yml").read_text())
    made = {rule["name"]["as"] for rule in adapter["rules"]}
    pattern = r"\b(?:heatlens_[a-z_]+|http_request_duration_seconds\w*|request_[a-z]+_seconds\w*)\b"
    named = set(re.findall(pattern, texts[path]))
    assert named <= await exposed() | made


@every_file
def test_variables_are_settings(path: Path) -> None:
    for section, key in re.findall(r"HEATLENS_([A-Z]+)__([A-Z_]+)", texts[path]):
        fields: Any = Settings.model_fields[section.lower()].annotation
        assert key.lower() in fields.model_fields, key


@every_page
def test_flags_exist(path: Path) -> None:
    for line in re.findall(r"heatlens serve(.*)", texts[path]):
        assert set(re.findall(r"--[a-z_-]+", line)) <= KNOWN_FLAGS


@every_page
def test_values_of_the_chart_exist(path: Path) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    text = texts[path]
    named = re.findall(r"--set(?:-file)? ([\w.]+)=", text)
    named += re.findall(r"`((?:autoscaling|podMonitor|networkPolicy)\.[\w.]+)", text)
    for name in named:
        found: Any = values
        for part in name.split("."):
            assert part in found, name
            found = found[part]


@every_page
def test_routes_of_calls_exist(path: Path) -> None:
    app = create_app(Settings(), FakePool())
    urls = re.findall(r"(?:127\.0\.0\.1|localhost):\d+(/[\w/@.-]+)", texts[path])
    for url in urls:
        scope = {"type": "http", "path": url, "method": "POST", "headers": []}
        assert any(route.matches(scope)[0] is not Match.NONE for route in app.routes), url


@every_page
def test_files_exist(path: Path) -> None:
    text = texts[path]
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (path.parent / link).exists(), link
    for link in re.findall(r"\]\(https://github\.com/heatlens/heatlens/tree/main/([^)]+)\)", text):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"(?<![\w./])((?:deploy|docs|benchmarks)/[\w/.-]+\w)", text):
        assert (ROOT / name).exists(), name


@every_page
def test_configurations_are_valid(path: Path) -> None:
    for block in re.findall(r"```toml\n(.*?)```", texts[path], re.DOTALL):
        values = tomllib.loads(block)
        values["models"] = [ModelSpec.model_validate(item) for item in values.get("models", [])]
        Settings.model_validate(values)
