"""Who may call what: every route has a level, and keeps to it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from msgspec import structs

from service.api.app import create_app
from service.settings import Settings
from tests.fakes import FakePool, fake_info
from tests.service.api.conftest import Serve

pytestmark = pytest.mark.anyio

KEYS = {"api_keys": ["caller"], "admin_keys": ["admin"]}

OPEN = """
GET /  GET /page/colormaps.json  GET /page/{path}
GET /livez  GET /readyz  GET /healthz
GET /v2  GET /v2/health/live  GET /v2/health/ready  GET /ping
"""
# Open too, unless `security.operations` is `key`.
OPERATIONS = """
GET /metrics  GET /openapi.json  GET /docs  GET /docs/start.js  GET /docs/{path}
"""
KEYED = """
POST /v1/predict  POST /v1/explain  POST /v1/features  POST /v1/compare
GET /v1/models  GET /v1/models/{name}  GET /v1/models/{name}/labels  GET /v1/models/{name}/layers
GET /v1/methods
POST /v2/models/{model}/infer  POST /v2/models/{model}/versions/{version}/infer
POST /v2/models/{model}/explain  POST /v2/models/{model}/versions/{version}/explain
GET /v2/models  GET /v2/models/{model}  GET /v2/models/{model}/versions/{version}
GET /v2/models/{model}/ready  GET /v2/models/{model}/versions/{version}/ready
GET /v2/models/{model}/config  GET /v2/models/{model}/versions/{version}/config
GET /v2/models/stats  GET /v2/models/{model}/stats
GET /v2/models/{model}/versions/{version}/stats
POST /v1/models/{model}:predict  POST /v1/models/{model}:explain  POST /invocations
POST /predictions/{model}  PUT /predictions/{model}
POST /explanations/{model}  PUT /explanations/{model}
POST /predictions/{model}/{version}  PUT /predictions/{model}/{version}
POST /explanations/{model}/{version}  PUT /explanations/{model}/{version}
"""
ADMIN = """
POST /v2/repository/index
POST /v2/repository/models/{model}/load  POST /v2/repository/models/{model}/unload
"""


def routes(text: str) -> set[tuple[str, str]]:
    return {(method, path) for method, path in re.findall(r"(\w+) (/\S*)", text)}


def served() -> Iterator[tuple[str, str]]:
    """Every method and path of the application, path parameters without their converters."""
    for context in iter_route_contexts(create_app(Settings(), FakePool()).routes):
        for method in context.methods or {"?"}:
            yield method, re.sub(r":\w+}", "}", str(context.path))


async def ask(client: httpx.AsyncClient, method: str, path: str, key: str = "") -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    filled = re.sub(r"{\w+}", "x", path)
    return (await client.request(method, filled, headers=headers)).status_code


def test_every_route_has_a_level() -> None:
    levels = [routes(text) for text in (OPEN, OPERATIONS, KEYED, ADMIN)]
    assert sum(map(len, levels)) == len(set.union(*levels))
    assert set(served()) == set.union(*levels)


async def test_keys_open_what_they_should(serve: Serve) -> None:
    async with serve(security=KEYS) as client:
        for method, path in routes(OPEN) | routes(OPERATIONS):
            assert await ask(client, method, path) not in (401, 403), path
        for method, path in routes(KEYED):
            assert await ask(client, method, path) == 401, path
            assert await ask(client, method, path, "stranger") == 401, path
            assert await ask(client, method, path, "caller") not in (401, 403), path
            assert await ask(client, method, path, "admin") not in (401, 403), path
        for method, path in routes(ADMIN):
            assert await ask(client, method, path) == 401, path
            assert await ask(client, method, path, "stranger") == 401, path
            assert await ask(client, method, path, "caller") == 403, path
            assert await ask(client, method, path, "admin") not in (401, 403), path


async def test_without_keys_everything_but_administration_is_open(serve: Serve) -> None:
    async with serve() as client:
        for method, path in routes(OPEN + OPERATIONS + KEYED):
            assert await ask(client, method, path) not in (401, 403), path
        for method, path in routes(ADMIN):
            assert await ask(client, method, path, "stranger") == 403, path


async def test_documentation_and_metrics_may_require_a_key(serve: Serve) -> None:
    async with serve(security={**KEYS, "operations": "key"}) as client:
        for method, path in routes(OPERATIONS):
            assert await ask(client, method, path) == 401, path
            assert await ask(client, method, path, "caller") not in (401, 403), path


async def test_an_unknown_path_is_not_found_with_or_without_a_key(serve: Serve) -> None:
    async with serve(security=KEYS) as client:
        assert await ask(client, "GET", "/v1/nothing") == 404
        assert await ask(client, "GET", "/v1/nothing", "caller") == 404


# ---------------------------------------------------------------- what is shown


def failed_pool() -> FakePool:
    info = fake_info()
    reason = "The weights file /models/secret/weights.pth does not exist."
    card = structs.replace(info.card, state="unavailable", ready=False, reason=reason)
    return FakePool([structs.replace(info, card=card)])


@pytest.fixture
def pool() -> FakePool:
    return failed_pool()


async def test_readiness_tells_paths_to_admins_only(serve: Serve) -> None:
    async with serve(security=KEYS) as client:
        for key in ("", "caller"):
            response = await client.get("/readyz", headers={"X-API-Key": key})
            assert response.status_code == 503
            assert "secret" not in response.text
            assert response.json()["missing"]
        assert "secret" in (await client.get("/readyz", headers={"X-API-Key": "admin"})).text


async def test_readiness_tells_only_whether_it_is_ready_if_details_require_a_key(
    serve: Serve,
) -> None:
    async with serve(security={**KEYS, "operations": "key"}) as client:
        document = (await client.get("/readyz")).json()
        assert document == {"ready": False, "missing": [], "devices": [], "models": []}
        assert (await client.get("/readyz", headers={"X-API-Key": "caller"})).json()["missing"]


async def test_every_response_forbids_sniffing_and_framing(serve: Serve) -> None:
    async with serve(security=KEYS) as client:
        for path in ("/", "/livez", "/docs", "/openapi.json", "/metrics", "/v1/models", "/nothing"):
            for accept in ("*/*", "text/html"):
                headers = (await client.get(path, headers={"Accept": accept})).headers
                assert headers["X-Content-Type-Options"] == "nosniff", path
                policy = headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy, path
                assert "frame-ancestors 'none'" in policy, path
                assert headers.get("Access-Control-Allow-Origin") is None


@pytest.mark.parametrize("path", ["/docs", "/"])
async def test_pages_load_nothing_from_elsewhere(serve: Serve, path: str) -> None:
    async with serve() as client:
        response = await client.get(path, headers={"Accept": "text/html"})
        assert response.headers["Content-Type"].startswith("text/html")
        links = re.findall(r"""(?:src|href)=["']?([^"' >]+)""", response.text)
        assert links
        for link in links:
            assert not re.match(r"(?:\w+:)?//", link), link
            if not link.startswith(("data:", "#")):
                assert (await client.get(httpx.URL(path).join(link))).status_code == 200, link
        # What is written in the page itself would not be run.
        assert not re.search(r"<script(?![^>]*\bsrc=)", response.text)


async def test_documentation_starts_with_the_document_of_this_service(serve: Serve) -> None:
    async with serve() as client:
        assert '"openapi.json"' in (await client.get("/docs/start.js")).text
        assert (await client.get("/docs/../../secret")).status_code == 404
        assert (await client.get("/docs/%2e%2e%2fcore.py")).status_code == 404
