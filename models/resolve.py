"""Resolves labels, globs, ranks and `auto` of a request against one model. No torch here."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from msgspec import structs

from models.areas import FORMS, MASK, Area, area_of
from models.errors import (
    InvalidOption,
    MethodNotApplicable,
    TargetOutOfRange,
    UnknownLabel,
    UnknownLayer,
)
from models.methods import METHODS
from models.types import ClassRef, ModelInfo, Target

MAX_RANK = 10
MAX_LAYERS = 64

_TARGET_KEYS = {"class", "against", *FORMS, MASK}

RawTarget = int | str | Mapping[str, Any]


def with_labels(info: ModelInfo, labels: Sequence[str], *, field: str = "labels") -> ModelInfo:
    """The model as a request sees it that brings labels, or brings none.

    Raises:
        InvalidOption: its classes are no texts, it has none and the request brings none, or one
            alone tells nothing.
    """
    card = info.card
    if not labels:
        if card.texts is not None and not info.labels:
            raise InvalidOption(f"{card.name} has no labels of its own: send some.", field=field)
        return info
    if card.texts is None:
        raise InvalidOption(
            f"The classes of {card.name} are fixed; models of the task zero_shot take labels.",
            field=field,
        )
    if card.texts.exclusive and len(labels) < 2:
        raise InvalidOption(
            "One label alone has the probability 1 for every image: send two or more.", field=field
        )
    card = structs.replace(card, num_classes=len(labels))
    return structs.replace(info, card=card, labels=tuple(labels))


def resolve_targets(
    raw: Sequence[RawTarget], info: ModelInfo, *, field: str = "targets"
) -> tuple[Target, ...]:
    """Turn class indices, labels, ranks, contrasts and classes within areas into targets, each once.

    Raises:
        TargetOutOfRange: an index or rank beyond the model's classes.
        UnknownLabel: no class has that label.
        InvalidOption: a label that several classes share, or a target of no known form.
    """
    areas: dict[Area, int] = {}
    targets = (_target(r, info, f"{field}.{i}", areas) for i, r in enumerate(raw))
    return tuple(dict.fromkeys(targets))


def resolve_methods(names: Sequence[str], info: ModelInfo) -> tuple[str, ...]:
    """Check that each method exists and can explain the model.

    Raises:
        InvalidOption: no such method.
        MethodNotApplicable: it cannot explain this model; the text names those that can.
    """
    support = {row.name: row for row in info.card.methods}
    for i, name in enumerate(names):
        if name not in METHODS:
            allowed = ", ".join(METHODS)
            raise InvalidOption(f"Unknown method. Allowed: {allowed}.", field=f"methods.{i}")
        row = support.get(name)
        if row is not None and not row.applicable:
            applicable = ", ".join(r.name for r in info.card.methods if r.applicable)
            raise MethodNotApplicable(
                f"{name} cannot explain {info.card.name}: {row.reason}. Applicable: {applicable}.",
                field=f"methods.{i}",
            )
    return tuple(dict.fromkeys(names))


def resolve_layers(globs: Sequence[str], info: ModelInfo, *, spatial: bool) -> tuple[str, ...]:
    """Turn names, globs and `auto` into dotted module names, in the model's order, each once.

    Args:
        globs: what the request says.
        info: the model.
        spatial: True for layers to explain (`auto` is the target layer, others must be maps); False
            for layers to describe (`auto` is the model's spread of feature layers).

    Raises:
        UnknownLayer: nothing matches, or only layers without a spatial output where one is needed.
        InvalidOption: more layers than one request may name.
    """
    names: dict[str, None] = {}
    for i, glob in enumerate(globs):
        for name in _matches(glob, info, spatial=spatial, field=f"layers.{i}"):
            names[name] = None
    if len(names) > MAX_LAYERS:
        raise InvalidOption(
            f"The layers match {len(names)} modules, at most {MAX_LAYERS} are allowed.",
            field="layers",
        )
    return tuple(sorted(names, key=lambda name: info.places.get(name, -1)))


def _matches(glob: str, info: ModelInfo, *, spatial: bool, field: str) -> list[str]:
    if glob == "auto":
        if not spatial:
            return list(info.feature_layers)
        if info.card.target_layer is None:
            raise UnknownLayer("The model has no recommended layer; name one.", field=field)
        return [info.card.target_layer]
    found = [layer for layer in info.layers if fnmatch.fnmatchcase(layer.name, glob)]
    if not found:
        path = f"/v1/models/{info.card.name}/layers"
        raise UnknownLayer(f"No layer matches; GET {path} lists them.", field=field)
    fitting = [layer.name for layer in found if layer.usable and (layer.spatial or not spatial)]
    if not fitting:
        purpose = "explained" if spatial else "described"
        raise UnknownLayer(f"{found[0].name} cannot be {purpose}: {found[0].reason}.", field=field)
    return fitting


def check_cam(methods: Sequence[str], layers: Sequence[str], info: ModelInfo) -> None:
    """Refuse CAM at any layer but the one whose maps the head's weights belong to.

    Raises:
        MethodNotApplicable: `cam` is asked for at another layer.
    """
    for layer in layers:
        if "cam" in methods and layer != info.card.target_layer:
            raise not_before_the_head(layer, info.card.target_layer)


def not_before_the_head(layer: str, target_layer: str | None) -> MethodNotApplicable:
    """The error for CAM at a layer that is not followed by the head at once."""
    return MethodNotApplicable(
        f"cam explains only the layer before the head, {target_layer}, not {layer}; "
        "gradcam explains any.",
        field="methods",
    )


def _target(raw: RawTarget, info: ModelInfo, field: str, areas: dict[Area, int]) -> Target:
    """One target; `areas` numbers those that were named so far, from 1."""
    if isinstance(raw, Mapping):
        if set(raw) - _TARGET_KEYS or "class" not in raw:
            raise InvalidOption(
                'A contrast is {"class": …, "against": […]}; a class within an area of an image '
                "that is segmented has `box`, `point` or `mask`.",
                field=field,
            )
        area = area_of(raw, field)
        _check_area(area, raw, info, field)
        number = 0 if area is None else areas.setdefault(area, len(areas) + 1)
        first = number * info.card.num_classes
        against = raw.get("against") or ()
        if isinstance(against, (str, int)) or not isinstance(against, Sequence):
            raise InvalidOption("`against` is a list of classes.", field=f"{field}.against")
        return Target(
            cls=_class_ref(raw["class"], info, f"{field}.class", first=first),
            against=tuple(
                dict.fromkeys(
                    _class_ref(a, info, f"{field}.against.{i}", first=first)
                    for i, a in enumerate(against)
                )
            ),
        )
    return Target(cls=_class_ref(raw, info, field))


def _check_area(area: Area | None, raw: Mapping[str, Any], info: ModelInfo, field: str) -> None:
    segments = info.card.task == "segmentation"
    if area is not None and not segments:
        raise InvalidOption(
            f"{info.card.name} does not segment images: its targets have no area.", field=field
        )
    if segments and area is None and raw.get("against"):
        raise InvalidOption(
            "Without an area each class is scored over pixels of its own; a contrast needs a `box`, "
            "`point` or `mask`.",
            field=field,
        )


def _class_ref(raw: object, info: ModelInfo, field: str, *, first: int = 0) -> ClassRef:
    """A class or rank, with `first` added to it."""
    classes = info.card.num_classes
    if isinstance(raw, bool) or not isinstance(raw, (int, str)):
        raise InvalidOption("A class is an index, a label or a rank such as top1.", field=field)
    if isinstance(raw, int) or (raw.isascii() and raw.isdecimal()):
        # A digit string of thousands of characters is out of range, and int() would refuse it.
        index = int(raw) if isinstance(raw, int) or len(raw) < 10 else classes
        if not 0 <= index < classes:
            raise TargetOutOfRange(f"Class indices run from 0 to {classes - 1}.", field=field)
        return ClassRef(kind="index", value=first + index)
    rank = raw.lower().removeprefix("top")
    if rank != raw.lower() and rank.isascii() and rank.isdecimal():
        best = min(MAX_RANK, classes)
        if len(rank) > 3 or not 1 <= int(rank) <= best:
            raise TargetOutOfRange(f"Ranks run from top1 to top{best}.", field=field)
        return ClassRef(kind="rank", value=first + int(rank))
    return ClassRef(kind="index", value=first + _index_of(raw, info, field))


def _index_of(label: str, info: ModelInfo, field: str) -> int:
    found = _label_index(info.labels).get(_normal(label), ())
    if not found:
        path = f"/v1/models/{info.card.name}/labels"
        raise UnknownLabel(f"The model has no such label; GET {path} lists them.", field=field)
    if len(found) > 1:
        indices = ", ".join(map(str, found))
        raise InvalidOption(
            f"Several classes have this label; name one by index: {indices}.", field=field
        )
    return found[0]


def _normal(label: str) -> str:
    return " ".join(label.replace("_", " ").lower().split())


@lru_cache(maxsize=16)
def _label_index(labels: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Class indices by whole label and, unless that is taken, by comma-separated synonym."""
    whole: dict[str, tuple[int, ...]] = {}
    synonyms: dict[str, tuple[int, ...]] = {}
    for index, label in enumerate(labels):
        whole[_normal(label)] = (*whole.get(_normal(label), ()), index)
        if "," in label:
            for part in map(_normal, label.split(",")):
                synonyms[part] = (*synonyms.get(part, ()), index)
    return synonyms | whole
