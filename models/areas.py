"""Areas of an image that targets of segmentation networks name, as the request has them. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import InvalidOption
from models.image_types import Region, Struct

SIDES = ("x", "y", "width", "height")
FORMS: Mapping[str, tuple[str, ...]] = {"box": SIDES, "point": SIDES[:2]}
MASK = "mask"


class Area(Struct):
    """A box in pixels of the original image (of no size: a point), or a mask over all of it.

    Attributes:
        mask: base64 of a PNG, stretched over the image; what is not dark belongs to the area.
    """

    box: Region | None = None
    mask: str | None = None


def area_of(target: object, field: str = "targets") -> Area | None:
    """The area that a raw target names, or None.

    Raises:
        InvalidOption: it names several, or one that is malformed.
    """
    if not isinstance(target, Mapping):
        return None
    named = [form for form in (*FORMS, MASK) if target.get(form) is not None]
    if len(named) > 1:
        raise InvalidOption("A target has one of `box`, `point` and `mask`.", field=field)
    if not named:
        return None
    (form,) = named
    raw = target[form]
    if form == MASK:
        if not isinstance(raw, str):
            raise InvalidOption("A mask is base64 of a PNG.", field=f"{field}.{form}")
        return Area(mask=raw)
    if (
        not isinstance(raw, Mapping)
        or set(raw) != set(FORMS[form])
        or not all(map(_is_number, raw.values()))
    ):
        names = ", ".join(f'"{name}": …' for name in FORMS[form])
        raise InvalidOption(
            f"A {form} is {{{names}}}, in pixels of the image.", field=f"{field}.{form}"
        )
    sides = {"width": 0.0, "height": 0.0} | {name: float(raw[name]) for name in FORMS[form]}
    if form == "box" and not (sides["width"] > 0 and sides["height"] > 0):
        raise InvalidOption("A box has a width and a height above 0.", field=f"{field}.{form}")
    return Area(box=Region(**sides))


def areas_of(targets: Sequence[object]) -> tuple[Area, ...]:
    """The distinct areas of raw targets, in their order.

    Raises:
        InvalidOption: see `area_of`.
    """
    found = (area_of(target, f"targets.{i}") for i, target in enumerate(targets))
    return tuple(dict.fromkeys(area for area in found if area is not None))


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and abs(value) <= 1e6
