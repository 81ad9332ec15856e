"""What a request may cost: its price in device time and in bytes, held against the limits."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import structs

from models.errors import InvalidOption
from models.price import Price, price
from models.types import JobOptions, ModelInfo, Operation

if TYPE_CHECKING:
    from service.api.plan import Plan, RenderOptions
    from service.settings import LimitSettings

# Bytes for each pixel of a picture, as photographs take them.
_PIXEL_BYTES: Mapping[str, float] = {"heatmap": 0.3, "jpeg": 0.35, "webp": 0.25, "png": 2.2}
# Base64 takes four bytes for three.
_BASE64 = 4 / 3
_EXPLANATION_BYTES = 700
_RESULT_BYTES = 1500
# Sides of a picture that is drawn on a whole image, at most.
_CANVAS_SIDE = 1024
# Prices that are remembered for a model.
_KEPT_PRICES = 64
# Sets of labels that are remembered.
_KEPT_SETS = 16

Cost = Callable[[JobOptions, "RenderOptions"], float]

_LEAST: Mapping[str, Callable[[JobOptions], dict[str, Any]]] = {
    "samples": lambda _: {"samples": 1},
    "steps": lambda _: {"steps": 1},
    "layers": lambda options: {"layers": options.layers[:1]},
    "targets": lambda options: {"targets": options.targets[:1]},
    "faithfulness": lambda _: {"faithfulness": ()},
    "kinds": lambda options: {"kinds": options.kinds[:1]},
    "channels": lambda _: {"channels": 1},
    "grid": lambda _: {"grid": False},
}
_LEAST_DRAWN: Mapping[str, Callable[[RenderOptions], dict[str, Any]]] = {
    "canvas": lambda _: {"canvas": "input"},
    "overlay_format": lambda _: {"overlay_format": "jpeg"},
    "outputs": lambda render: {"outputs": render.outputs[:1]},
}


def price_of(operation: Operation, options: JobOptions, info: ModelInfo) -> Price:
    """What `price` finds, remembered with the model: most jobs are priced alike."""
    # Interventions may be megabytes.
    kept = {} if options.interventions else info.prices
    key = operation, options
    found: Price | None = kept.get(key)
    if found is None:
        if len(kept) >= _KEPT_PRICES:
            kept.clear()
        found = kept[key] = price(operation, options, info)
    return found


def answer_bytes(plan: Plan, cost: Price, render: RenderOptions) -> int:
    """Size of one image's part of the answer, and of the results that it is made from."""
    card = plan.info.card
    if plan.operation not in ("explain", "compare"):
        return _RESULT_BYTES + cost.result_bytes
    pixels = math.prod(card.input.crop) if card.input is not None else 0
    if render.canvas == "original":
        pixels = _CANVAS_SIDE**2
    drawn = 0.0
    if "heatmap" in render.outputs:
        drawn += pixels * _PIXEL_BYTES["heatmap"]
    if "overlay" in render.outputs:
        drawn += pixels * _PIXEL_BYTES[render.overlay_format]
    pictures = cost.maps * (_EXPLANATION_BYTES + _BASE64 * drawn)
    return _RESULT_BYTES + max(int(pictures), int(_BASE64 * cost.result_bytes))


def check_budget(plan: Plan, limits: LimitSettings) -> None:
    """Refuse a request that costs more than it may.

    Raises:
        InvalidOption: it does; the error names the option that accounts for most of it.
    """
    allowed_s = max(1, len(plan.info.card.devices)) * (plan.deadline - plan.started)
    allowed_s = min(limits.max_device_s, allowed_s)

    def device_s(options: JobOptions, _: RenderOptions) -> float:
        return price(plan.operation, options, plan.info).device_ms / 1000

    def answer_mb(options: JobOptions, render: RenderOptions) -> float:
        cost = price(plan.operation, options, plan.info)
        return answer_bytes(plan, cost, render) / 1_000_000

    needed_s = plan.device_ms / 1000
    # A plain prediction that comes too late ends by its deadline.
    if needed_s > allowed_s and plan.is_long:
        field = _heaviest(plan, device_s, allowed=allowed_s)
        if needed_s - plan.encoding_ms / 1000 <= allowed_s:
            field = "labels"
        raise InvalidOption(
            f"The request needs about {needed_s:.3g} s of the device and may have "
            f"{allowed_s:.3g} s (`timeout_s`, or the limit of the service). Most of it is for "
            f"`{field}`: lower that.",
            field=field,
        )
    needed_mb = plan.answer_bytes / 1_000_000
    if needed_mb > limits.max_answer_mb:
        field = _heaviest(plan, answer_mb, allowed=limits.max_answer_mb)
        raise InvalidOption(
            f"The answer would have about {needed_mb:.3g} MB and may have "
            f"{limits.max_answer_mb:g} MB. Most of it is for `{field}`: lower that.",
            field=field,
        )


def _heaviest(plan: Plan, cost: Cost, *, allowed: float) -> str:
    """The option with whose least value the request would cost least, or `images`."""
    images, render = [image.options for image in plan.images], plan.render

    def total(images: Sequence[JobOptions], render: RenderOptions) -> float:
        distinct = {id(options): cost(options, render) for options in images}
        return sum(distinct[id(options)] for options in images)

    left: dict[str, float] = {}
    for field, least in _LEAST.items():
        left[field] = total([structs.replace(o, **least(o)) for o in images], render)
    for name in images[0].methods:
        fewer = total([structs.replace(o, methods=(name,)) for o in images], render)
        left["methods"] = min(fewer, left.get("methods", math.inf))
    for field, least_drawn in _LEAST_DRAWN.items():
        left[field] = total(images, structs.replace(render, **least_drawn(render)))
    heaviest = min(left, key=lambda field: left[field])
    return heaviest if left[heaviest] <= allowed else "images"


class LabelSets:
    """The label sets of earlier requests, which devices need not encode again.

    They decide only what is expected.
    """

    def __init__(self) -> None:
        self._sets: OrderedDict[tuple[str, str, tuple[str, ...]], None] = OrderedDict()

    def add(self, info: ModelInfo) -> None:
        """A request has been answered whose labels are those of `info`."""
        key = _key(info, info.labels)
        self._sets[key] = None
        self._sets.move_to_end(key)
        while len(self._sets) > _KEPT_SETS:
            self._sets.popitem(last=False)

    def has(self, info: ModelInfo, labels: Sequence[str]) -> bool:
        """Whether a model has answered a request with these labels."""
        return _key(info, labels) in self._sets


def _key(info: ModelInfo, labels: Sequence[str]) -> tuple[str, str, tuple[str, ...]]:
    return info.card.full_name, info.fingerprint, tuple(labels)
