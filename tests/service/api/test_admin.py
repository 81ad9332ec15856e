"""The model repository: who may use it, what it loads, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec
import pytest

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed
from models.types import ModelInfo
from service.configuration import ConfigurationError
from service.settings import Settings
from tests.fakes import FakePool, fake_info

pytestmark = pytest.mark.anyio

Serve = Callable[..., Any]

ADMIN = {"X-API-Key": "admin"}
USER = {"X-API-Key": "user"}
KEYS = {"api_keys": ["user"], "admin_keys": ["admin"]}
PATHS = ("index", "models/m/load", "models/m/unload")


def spec(version: str, name: str = "m") -> ModelSpec:
    return ModelSpec(name=name, version=version, source="timm:resnet10t")


class File:
    """A configuration file that changes while the service runs."""

    def __init__(self, *specs: ModelSpec) -> None:
        self.specs = list(specs)
        self.wrong = False

    def read(self) -> Settings:
        if self.wrong:
            raise ConfigurationError("models.0.source: secret-path is not a source")
        return Settings(models=self.specs)


@pytest.fixture
def file() -> File:
    return File(spec("1"), spec("2"), spec("1", "other"))


@pytest.fixture
async def admin(serve: Serve, pool: FakePool, file: File) -> AsyncIterator[httpx.AsyncClient]:
    pool.infos = [fake_info(spec("1")), fake_info(spec("1", "other"))]
    async with serve(file.read, security=KEYS, models=[spec("1").model_dump()]) as client:
        client.headers = ADMIN
        yield client


async def index(client: httpx.AsyncClient, **body: Any) -> dict[str, str]:
    response = await client.post("/v2/repository/index", json=body)
    assert response.status_code == 200
    return {f"{item['name']}@{item['version']}": item["state"] for item in response.json()}


def held(pool: FakePool) -> set[str]:
    return {f"{info.card.name}@{info.card.version}" for info in pool.infos}


# ---------------------------------------------------------------- who


@pytest.mark.parametrize("path", PATHS)
async def test_off_without_an_admin_key(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(f"/v2/repository/{path}")
    assert (response.status_code, response.json()["code"]) == (403, "admin_disabled")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "unauthorized"),
        ({"X-API-Key": "x"}, 401, "unauthorized"),
        (USER, 403, "forbidden"),
    ],
)
async def test_only_an_admin_key_opens_it(
    serve: Serve, pool: FakePool, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    before = held(pool)
    async with serve(security=KEYS) as client:
        response = await client.post(f"/v2/repository/{path}", headers=headers)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert held(pool) == before


# ---------------------------------------------------------------- what


async def test_index_lists_what_is_loaded_and_what_could_be(admin: httpx.AsyncClient) -> None:
    assert await index(admin) == {"m@1": "READY", "other@1": "READY", "m@2": "UNAVAILABLE"}
    assert await index(admin, ready=True) == {"m@1": "READY", "other@1": "READY"}


async def test_only_administrators_are_told_what_caused_a_failure(
    admin: httpx.AsyncClient, pool: FakePool
) -> None:
    card = msgspec.structs.replace(
        pool.infos[0].card,
        state="unavailable",
        ready=False,
        reason="The factory raised.",
        cause="OSError: secret (net.py:2)",
    )
    pool.infos[0] = ModelInfo(card=card)
    listed = (await admin.post("/v2/repository/index", json={})).json()
    assert listed[0]["reason"] == "The factory raised. Cause: OSError: secret (net.py:2)"
    assert (await admin.get("/v1/models/m")).json()["cause"] == card.cause
    assert (await admin.get("/v1/models")).json()["cards"][0]["cause"] == card.cause
    for path in ("/v1/models", "/v1/models/m", "/readyz"):
        answer = await admin.get(path, headers={"X-API-Key": ""})
        assert "secret" not in answer.text


@pytest.mark.parametrize("body", [b"", b"{}", b' {"parameters": {}} '])
async def test_load_reads_the_file_of_this_moment(
    admin: httpx.AsyncClient, pool: FakePool, file: File, body: bytes
) -> None:
    file.specs = [*file.specs, spec("3")]
    response = await admin.post("/v2/repository/models/m@3/load", content=body)
    assert (response.status_code, response.json()) == (200, {})
    assert held(pool) == {"m@1", "other@1", "m@3"}
    assert (await index(admin))["m@3"] == "READY"


async def test_load_of_a_name_is_of_all_its_versions(
    admin: httpx.AsyncClient, pool: FakePool
) -> None:
    assert (await admin.post("/v2/repository/models/m/load")).status_code == 200
    assert held(pool) == {"m@1", "m@2", "other@1"}


async def test_requests_meet_the_highest_version_or_the_one_they_pin(
    admin: httpx.AsyncClient, png: bytes
) -> None:
    async def version(query: str) -> str:
        response = await admin.post(f"/v1/predict{query}", content=png)
        return (
            response.json()
            .get("model", response.json())
            .get("version", response.json().get("code"))
        )

    await admin.post("/v2/repository/models/m/load")
    assert await version("") == "2"
    assert await version("?model=m@1") == "1"
    assert (await admin.post("/v2/repository/models/m@2/unload")).status_code == 200
    assert await version("") == "1"
    assert await version("?model=m@2") == "unknown_model"


async def test_unload_of_a_name_is_of_all_its_versions(
    admin: httpx.AsyncClient, pool: FakePool
) -> None:
    await admin.post("/v2/repository/models/m/load")
    response = await admin.post(
        "/v2/repository/models/m/unload", json={"parameters": {"unload_dependents": True}}
    )
    assert response.status_code == 200
    assert held(pool) == {"other@1"}
    assert (await index(admin))["m@1"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("models/nothing/load", b"", 404, "unknown_model"),
        ("models/m@9/load", b"", 404, "unknown_model"),
        ("models/nothing/unload", b"", 404, "unknown_model"),
        ("models/m/load", b'{"parameters": {"config": "{}"}}', 422, "invalid_option"),
        ("models/m/load", b'{"parameters": {"file:1/model.pt": "AA=="}}', 422, "invalid_option"),
        ("models/m/load", b'{"parameters": 3}', 422, "invalid_option"),
        ("models/m/load", b"[]", 400, "malformed_body"),
        ("models/m/load", b"{", 400, "malformed_body"),
        ("models/m/load", b"\xff", 400, "malformed_body"),
        ("models/m/load", b" " * 70_000, 413, "body_too_large"),
        ("index", b'{"ready": 1}', 422, "invalid_option"),
    ],
)
async def test_what_is_refused(
    admin: httpx.AsyncClient, pool: FakePool, path: str, body: bytes, status: int, code: str
) -> None:
    before = held(pool)
    response = await admin.post(f"/v2/repository/{path}", content=body)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert held(pool) == before


async def test_a_model_that_cannot_be_loaded_is_a_typed_error(
    admin: httpx.AsyncClient, pool: FakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load(_: ModelSpec) -> None:
        raise ModelLoadFailed("The weights do not fit.")

    monkeypatch.setattr(pool, "load", load)
    response = await admin.post("/v2/repository/models/m/load")
    assert (response.status_code, response.json()["code"]) == (422, "model_load_failed")


async def test_a_wrong_file_is_not_shown(admin: httpx.AsyncClient, file: File) -> None:
    file.wrong = True
    response = await admin.post("/v2/repository/models/m/load")
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "secret-path" not in response.text
