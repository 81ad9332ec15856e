"""`--verify`: compares each response under load with the one that its image gets alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import msgspec

from models.types import Struct
from service.cli.bench.client import Client, NoResponse
from service.cli.bench.requests import BenchError

DEFAULT_TOLERANCE = 0.01


class Fingerprint(Struct):
    """The numbers that distinguish the responses to different images.

    Attributes:
        size: width and height of the original image.
        scores: score by class, of the listed classes.
        maps: class, minimum and maximum of each explanation's raw map.
    """

    size: tuple[int, int]
    scores: dict[int, float]
    maps: tuple[tuple[int, float, float], ...] = ()


class Verifier:
    """Compares responses with the expected ones.

    `tolerance` is the largest difference of scores and map values, relative to the largest of them.
    """

    def __init__(self, expected: Sequence[Fingerprint], *, tolerance: float) -> None:
        self._expected = expected
        self._tolerance = tolerance

    def is_right(self, image: int, body: bytes) -> bool:
        """Whether a body is the response to the image of this number."""
        found = fingerprint(body)
        return found is not None and same(self._expected[image], found, self._tolerance)

    def twins(self) -> int:
        """Number of pairs of images with indistinguishable responses."""
        return sum(same(a, b, self._tolerance) for a, b in combinations(self._expected, 2))


async def learn(client: Client, *, tolerance: float = DEFAULT_TOLERANCE) -> Verifier:
    """Send the client's requests one after the other and remember the responses.

    Raises:
        BenchError: a request fails.
    """
    expected = []
    for request in client.requests:
        try:
            response = await client.send(request)
        except NoResponse as error:
            raise BenchError(f"Image {request.image} got no response: {error}.") from None
        found = fingerprint(response.body) if response.status == 200 else None
        if found is None:
            raise BenchError(f"Image {request.image} alone got status {response.status}.")
        expected.append(found)
    return Verifier(expected, tolerance=tolerance)


def fingerprint(body: bytes) -> Fingerprint | None:
    """Fingerprint of a response of `/v1/predict` or `/v1/explain`; None for any other body."""
    try:
        (result,) = msgspec.json.decode(body)["results"]
        return Fingerprint(
            size=(result["image"]["width"], result["image"]["height"]),
            scores={row["class_id"]: row["score"] for row in result["predictions"]},
            maps=tuple(
                (row["target"]["class_id"], row["range"]["min"], row["range"]["max"])
                for row in result.get("explanations", ())
            ),
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None


def same(left: Fingerprint, right: Fingerprint, tolerance: float) -> bool:
    """Whether two responses agree.

    Nearly equal classes may swap places in the list, or fall off its end.
    """
    if left.size != right.size or len(left.maps) != len(right.maps):
        return False
    limit = tolerance * max(map(abs, left.scores.values()), default=0.0)
    if any(gap > limit for gap in _score_gaps(left.scores, right.scores)):
        return False
    for (class_id, low, high), (other, other_low, other_high) in zip(
        left.maps, right.maps, strict=True
    ):
        # Two classes with nearly the same top score have different maps.
        gap = max(abs(low - other_low), abs(high - other_high))
        if class_id == other and gap > tolerance * max(abs(low), abs(high)):
            return False
    return True


def _score_gaps(left: dict[int, float], right: dict[int, float]) -> Iterator[float]:
    for a, b in ((left, right), (right, left)):
        lowest = min(b.values(), default=0.0)
        for class_id, score in a.items():
            yield abs(score - b[class_id]) if class_id in b else max(0.0, score - lowest)
