"""Fingerprints tell images apart and tolerate rounding and near ties."""

from __future__ import annotations

import json

import pytest

from service.cli.bench.client import Client
from service.cli.bench.requests import BenchError, image_requests
from service.cli.bench.verify import Fingerprint, fingerprint, learn, same


def body(scores: dict[int, float], *, size=(50, 40), maps=((3, 0.0, 2.0),)) -> bytes:
    result = {
        "image": {"width": size[0], "height": size[1], "region": {}},
        "predictions": [{"class_id": c, "score": s} for c, s in scores.items()],
        "explanations": [
            {"target": {"class_id": c}, "range": {"min": low, "max": high}} for c, low, high in maps
        ],
    }
    return json.dumps({"results": [result]}).encode()


BASE = {3: 9.0, 5: 4.0, 7: 3.99}


@pytest.mark.parametrize(
    ("other", "agrees"),
    [
        (body(BASE), True),
        # A near tie swapped places.
        (body({3: 9.01, 7: 4.0, 5: 3.99}), True),
        # The last class fell off the list.
        (body({3: 9.0, 5: 4.0, 8: 3.98}), True),
        (body({3: 9.5, 5: 4.0, 7: 3.99}), False),
        (body({3: 9.0, 5: 4.0, 8: 5.0}), False),
        (body(BASE, size=(40, 50)), False),
        (body(BASE, maps=((3, 0.0, 2.5),)), False),
        (body(BASE, maps=((3, 0.0, 2.001),)), True),
        (body(BASE, maps=()), False),
    ],
)
def test_same_within_the_tolerance(other: bytes, agrees: bool) -> None:
    left, right = fingerprint(body(BASE)), fingerprint(other)
    assert same(left, right, 0.01) is same(right, left, 0.01) is agrees


def test_a_constant_map_is_a_map() -> None:
    flat = Fingerprint(size=(1, 1), scores={1: 1.0}, maps=((1, 0.0, 0.0),))
    peak = Fingerprint(size=(1, 1), scores={1: 1.0}, maps=((1, 0.0, 0.1),))
    assert same(flat, flat, 0.01)
    assert not same(flat, peak, 0.01)


@pytest.mark.parametrize(
    "other", [b"", b"[]", b"{}", b'{"results": []}', b'{"results": [{"error": {}}]}', b"\xff"]
)
def test_other_bodies_have_no_fingerprint(other: bytes) -> None:
    assert fingerprint(other) is None


@pytest.mark.anyio
async def test_responses_are_learnt_one_by_one(serve, respond) -> None:
    async def classify(seen):
        return respond(body({1: float(seen.body[0])}))

    requests = image_requests([b"a", b"b", b"b"])
    async with serve(classify) as (server, url), Client(url, requests, timeout_s=2) as client:
        verifier = await learn(client)
    assert [seen.body for seen in server.seen] == [b"a", b"b", b"b"]
    assert verifier.is_right(0, body({1: 97.0}))
    assert not verifier.is_right(0, body({1: 98.5}))
    assert not verifier.is_right(0, b"nonsense")
    # Two of the three images are the same.
    assert verifier.twins() == 1


@pytest.mark.anyio
async def test_a_failure_cannot_be_learnt(serve, respond) -> None:
    async def refuse(_seen):
        return respond({"code": "not_ready"}, status=503)

    requests = image_requests([b"a"])
    async with serve(refuse) as (_, url), Client(url, requests, timeout_s=2) as client:
        with pytest.raises(BenchError, match="503"):
            await learn(client)
