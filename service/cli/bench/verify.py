"""Whether an answer under load is the answer that its picture gets alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import msgspec

from models.types import Struct
from service.cli.bench.client import Client
from service.cli.bench.connection import ConnectionLost
from service.cli.bench.requests import Request

DEFAULT_TOLERANCE = 0.01


class CannotVerify(Exception):
    """The service does not even answer alone; the text says why."""


class Fingerprint(Struct):
    """What tells one picture's answer from another's.

    Attributes:
        size: width and height of the original picture.
        scores: logit by class, of the classes that are listed.
        maps: (least, greatest) value of each explanation's raw map, and its class.
    """

    size: tuple[int, int]
    scores: dict[int, float]
    maps: tuple[tuple[int, float, float], ...] = ()


class Verifier:
    """Knows the answer of every picture.

    Args:
        expected: fingerprints by number of the picture.
        tolerance: largest difference of scores and map values, over the largest of them.
    """

    def __init__(self, expected: Sequence[Fingerprint], *, tolerance: float) -> None:
        self._expected = expected
        self._tolerance = tolerance

    def is_right(self, picture: int, body: bytes) -> bool:
        """Whether a body is the answer of this picture."""
        found = fingerprint(body)
        return found is not None and same(self._expected[picture], found, self._tolerance)

    def twins(self) -> int:
        """Pairs of pictures whose answers could not be told apart if they were swapped."""
        return sum(same(a, b, self._tolerance) for a, b in combinations(self._expected, 2))


async def learn(
    client: Client, requests: Sequence[Request], *, tolerance: float = DEFAULT_TOLERANCE
) -> Verifier:
    """Ask for every picture's answer, one after the other.

    Raises:
        CannotVerify: one is not answered.
    """
    expected = []
    for request in requests:
        try:
            answer = await client.ask(request)
        except ConnectionLost as error:
            raise CannotVerify(f"Picture {request.picture} got no answer: {error}.") from None
        found = fingerprint(answer.body) if answer.status == 200 else None
        if found is None:
            raise CannotVerify(
                f"Picture {request.picture} alone was answered with status {answer.status}."
            )
        expected.append(found)
    return Verifier(expected, tolerance=tolerance)


def fingerprint(body: bytes) -> Fingerprint | None:
    """Of an answer to `/v1/predict` or `/v1/explain`; None if it is none."""
    try:
        answer = msgspec.json.decode(body)
        (result,) = answer["results"]
        return _of_result(result)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None


def _of_result(result: dict[str, Any]) -> Fingerprint:
    image = result["image"]
    return Fingerprint(
        size=(image["width"], image["height"]),
        scores={row["class_id"]: row["score"] for row in result["predictions"]},
        maps=tuple(
            (row["target"]["class_id"], row["range"]["min"], row["range"]["max"])
            for row in result.get("explanations", ())
        ),
    )


def same(left: Fingerprint, right: Fingerprint, tolerance: float) -> bool:
    """Whether two answers agree; near-equal classes may change places in the list or fall off its end."""
    if left.size != right.size or len(left.maps) != len(right.maps):
        return False
    scale = max(map(abs, left.scores.values()), default=0.0)
    if any(gap > tolerance * scale for gap in _score_gaps(left.scores, right.scores)):
        return False
    for (class_id, low, high), (other, other_low, other_high) in zip(
        left.maps, right.maps, strict=True
    ):
        # Two classes that are top-1 within the tolerance have maps of their own.
        gap = max(abs(low - other_low), abs(high - other_high))
        if class_id == other and gap > tolerance * max(abs(low), abs(high)):
            return False
    return True


def _score_gaps(left: dict[int, float], right: dict[int, float]) -> Iterator[float]:
    for a, b in ((left, right), (right, left)):
        least = min(b.values(), default=0.0)
        for class_id, score in a.items():
            yield abs(score - b[class_id]) if class_id in b else max(0.0, score - least)
