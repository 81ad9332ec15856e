"""The web page as an HTTP client sees it: one route for two kinds of client, safe headers, small files."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import httpx
import pytest

import service
from models.imaging.colormaps import COLORMAPS

pytestmark = pytest.mark.anyio

WEB = Path(service.__file__).parent / "web"
FILES = sorted(path.relative_to(WEB).as_posix() for path in WEB.rglob("*") if path.is_file())
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


async def test_browsers_get_the_page_and_others_name_and_version(client: httpx.AsyncClient) -> None:
    page = await client.get("/", headers=BROWSER)
    assert page.headers["content-type"].startswith("text/html")
    assert "<title>Heatlens" in page.text
    for accept in ("*/*", "application/json"):
        alive = await client.get("/", headers={"Accept": accept})
        assert alive.json()["status"] == "alive"
        assert alive.headers["vary"] == page.headers["vary"] == "Accept"


async def test_nothing_may_come_from_elsewhere(client: httpx.AsyncClient) -> None:
    headers = (await client.get("/", headers=BROWSER)).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy.pop("img-src") == "'self' data: blob:"
    assert policy.keys() >= {"default-src", "script-src", "style-src", "connect-src"}
    assert set(policy.values()) == {"'none'", "'self'"}
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", FILES)
async def test_every_file(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get(f"/page/{name}")
    assert response.content == (WEB / name).read_bytes()
    expected = {
        "html": r"text/html.*",
        "js": r"(text|application)/javascript.*",
        "css": r"text/css.*",
        "svg": r"image/svg\+xml",
        "jpg": "image/jpeg",
        "md": "text/markdown.*",
    }[name.rpartition(".")[2]]
    assert re.fullmatch(expected, response.headers["content-type"])
    assert response.headers["cache-control"] == "no-cache"
    again = await client.get(f"/page/{name}", headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["js", "nope.js", "../app.py", "%2e%2e/settings.py", "js/%00", "/etc/passwd", "x" * 300]
)
async def test_nothing_else_is_served(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(f"/page/{path}")
    assert (response.status_code, response.json()["code"]) == (404, "unknown_route")


async def test_colour_tables_are_those_of_the_service(client: httpx.AsyncClient) -> None:
    tables = (await client.get("/page/colormaps.json")).json()
    assert {name: base64.b64decode(text) for name, text in tables.items()} == {
        name: table.tobytes() for name, table in COLORMAPS.items()
    }


def test_the_page_is_small() -> None:
    sizes = [(WEB / name).stat().st_size for name in FILES if not name.endswith((".jpg", ".md"))]
    assert sum(sizes) < 150_000


def test_imports_name_files_that_exist() -> None:
    imports = 0
    for name in FILES:
        if name.endswith(".js"):
            for other in re.findall(
                r'^import .* from "\./([^"]+)";$', (WEB / name).read_text(), re.MULTILINE
            ):
                assert (WEB / "js" / other).is_file(), f"{name} imports {other}"
                imports += 1
    assert imports > 50


def test_samples_have_a_licence() -> None:
    listed = (WEB / "samples" / "LICENSES.md").read_text()
    for path in (WEB / "samples").glob("*.jpg"):
        assert f"`{path.name}`" in listed
        assert path.stat().st_size < 80_000
