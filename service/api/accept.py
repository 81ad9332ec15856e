"""What a client prefers to JSON, by its `Accept` header."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

_QUALITY = re.compile(r"q\s*=\s*([01](?:\.[0-9]{0,3})?)")

T = TypeVar("T")


def preferred(accept: str, forms: Mapping[str, T]) -> T | None:
    """What an `Accept` header prefers to JSON, of `forms` by media type; None if nothing."""
    best: T | None = None
    best_quality = json_quality = 0.0
    for media_type, quality in _qualities(accept):
        if media_type in ("application/json", "application/*"):
            json_quality = max(json_quality, quality)
        elif media_type in forms and quality > best_quality:
            best, best_quality = forms[media_type], quality
    return best if best_quality > json_quality else None


# Clients send the same few headers.
@lru_cache(maxsize=32)
def _qualities(accept: str) -> Sequence[tuple[str, float]]:
    """The media types of an `Accept` header with their qualities."""
    found: list[tuple[str, float]] = []
    for item in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in item.split(";"))
        qualities = (float(match[1]) for match in map(_QUALITY.fullmatch, parameters) if match)
        found.append((media_type, next(qualities, 1.0)))
    return found
