"""The mixture that a soak sends: good requests of every kind, bad ones, and clients that leave."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from service.cli.bench.requests import Request

RETRYABLE = frozenset({429, 503, 504})
"""Typed refusals that any good request may meet while a device is lost, replaced or full."""


class Leaving(Enum):
    """When the client leaves."""

    STAYS = "stays"
    IN_BODY = "half of the body sent"
    WAITING = "while waiting"


@dataclass(frozen=True)
class Kind:
    """One sort of request.

    Attributes:
        weight: share in the mixture.
        statuses: what it may be answered with.
    """

    name: str
    weight: float
    request: Request
    statuses: frozenset[int]
    leaving: Leaving = Leaving.STAYS


def mixture(images: Sequence[bytes]) -> list[Kind]:
    """All kinds; the image of each is its own."""
    kinds: list[Kind] = []

    def add(
        name: str,
        weight: float,
        path: str,
        *,
        body: bytes | None = None,
        status: int = 200,
        leaving: Leaving = Leaving.STAYS,
        headers: dict[str, str] | None = None,
    ) -> None:
        data = images[len(kinds) % len(images)] if body is None else body
        request = Request(path=path, body=data, headers=headers or {}, image=len(kinds))
        allowed = RETRYABLE | {status} if status == 200 else frozenset({status})
        kinds.append(Kind(name, weight, request, frozenset(allowed), leaving))

    add("predict", 40, "/v1/predict")
    add("explain", 22, "/v1/explain")
    add(
        "explain, three methods",
        5,
        "/v1/explain?methods=gradcam,layercam,hirescam&targets=top1,top2",
    )
    add("explain, original canvas", 3, "/v1/explain?canvas=original&outputs=overlay")
    add("explain as an image", 3, "/v1/explain", headers={"Accept": "image/jpeg"})
    add("features", 5, "/v1/features")
    add("no time left", 2, "/v1/explain", headers={"X-Request-Timeout-Ms": "1"}, status=504)
    add("not an image", 2, "/v1/explain", body=b"this is not an image " * 50, status=415)
    add("truncated", 2, "/v1/explain", body=images[0][: len(images[0]) // 3], status=422)
    add("empty", 1, "/v1/predict", body=b"", status=400)
    bad = json.dumps({"images": [{"b64": "?"}]}).encode()
    json_type = {"Content-Type": "application/json"}
    add("bad JSON", 1, "/v1/explain", body=bad[:-3], status=400, headers=json_type)
    add("bad base64", 1, "/v1/explain", body=bad, status=422, headers=json_type)
    add("unknown method", 1, "/v1/explain?methods=nonsense", status=422)
    add("unknown model", 1, "/v1/predict?model=nonsense", status=404)
    add("target out of range", 1, "/v1/explain?targets=99999", status=422)
    add("unknown route", 1, "/v1/nonsense", status=404)
    add("leaves in the body", 3, "/v1/explain", leaving=Leaving.IN_BODY)
    add("leaves while waiting", 6, "/v1/explain", leaving=Leaving.WAITING)
    return kinds


def draw(kinds: Sequence[Kind], count: int, *, seed: int) -> list[Kind]:
    """Draw `count` kinds by weight; the same seed draws the same ones."""
    chance = random.Random(seed)
    return chance.choices(kinds, weights=[kind.weight for kind in kinds], k=count)
