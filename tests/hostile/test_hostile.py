"""Every bad request gets a typed error below 500, in time, in our own words; then a good one is answered."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from models.errors import HeatlensError
from models.imaging.decode import DecodeLimits
from models.imaging.prepare import prepare
from models.types import Preprocess
from service.api.app import create_app
from service.settings import Settings
from tests.fakes import FakePool
from tests.hostile.pictures import mutated, seeds
from tests.hostile.requests import BYTES, PNG, Bad, bad_requests

SPEC = Preprocess(resize=36, crop=(32, 32))
SETTINGS = Settings(security={"admin_keys": ["admin"]}, limits={"max_body_mb": 5})
LEAST = 300

# Words of libraries, addresses of memory, and paths of this machine.
_LEAK = re.compile(
    r"Traceback|0x[0-9a-f]{6}|site-packages|/usr/|/home/|/root|PIL\b|pydantic|msgspec"
)
# Ours, and TorchServe's.
_SHAPES = ({"error", "code", "request_id"}, {"code", "type", "message"})
# What happens to be right: some damage leaves an image that can be read.
_MAY_BE_SOUND = re.compile(r"^an image: |another method|^GET /|/repository/|stats")


def requests() -> list[Bad]:
    return list(bad_requests(create_app(SETTINGS, FakePool())))


@asynccontextmanager
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(SETTINGS, FakePool())
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://testserver") as made,
    ):
        yield made


def fault(bad: Bad, response: httpx.Response) -> str:
    """What is wrong with a response; empty if nothing."""
    if response.status_code >= 500:
        return f"{response.status_code} {response.text[:100]}"
    if response.status_code < 400:
        return "" if _MAY_BE_SOUND.search(bad.name) else f"{response.status_code}"
    if response.headers["content-type"] != "application/json":
        return f"an error as {response.headers['content-type']}"
    document = response.json()
    if not any(shape <= document.keys() for shape in _SHAPES):
        return f"an error of another shape: {response.text[:100]}"
    if found := _LEAK.search(response.text):
        return f"an error that tells {found[0]}"
    return ""


def test_the_requests_are_many_and_distinct() -> None:
    found = requests()
    assert len({bad.identity for bad in found}) >= LEAST
    paths = {bad.path.partition("?")[0] for bad in found}
    assert {"/v1/predict", "/v1/explain", "/v1/features", "/v2/models/x/infer"} <= paths


@pytest.mark.anyio
@pytest.mark.timeout(300)
async def test_every_bad_request_is_refused_in_our_own_words() -> None:
    faults, statuses = [], Counter[int]()
    async with client() as asked:
        for bad in requests():
            headers = {"X-API-Key": "admin", **bad.headers}
            response = await asked.request(bad.method, bad.path, content=bad.body, headers=headers)
            statuses[response.status_code] += 1
            if found := fault(bad, response):
                faults.append(f"{bad.name}: {found}")
        good = await asked.post("/v1/predict", content=PNG, headers={"Content-Type": BYTES})
        assert good.status_code == 200
    assert not faults, "\n".join(faults[:30])
    assert set(statuses) >= {400, 404, 405, 413, 415, 422}


def test_mutated_pictures_are_decoded_or_refused() -> None:
    """The short form of `make fuzz`."""
    chosen = random.Random(1)
    ends = Counter[str]()
    for _ in range(600):
        _, data = mutated(chosen)
        try:
            prepare(data, limits=DecodeLimits(), spec=SPEC, canvas="original")
        except HeatlensError as error:
            ends[error.code] += 1
        else:
            ends["decoded"] += 1
    assert set(ends) <= {
        "decoded",
        "image_undecodable",
        "image_too_large",
        "image_too_small",
        "unsupported_media_type",
    }
    assert ends["decoded"] > 20
    assert ends["image_undecodable"] > 100


def test_the_seeds_are_sound() -> None:
    for name, data in seeds().items():
        prepared = prepare(data, limits=DecodeLimits(), spec=SPEC, canvas="none")
        assert prepared.input.shape == (32, 32, 3), name
