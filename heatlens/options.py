"""The options of each operation, as keyword arguments; see docs/reference/options.md."""

from __future__ import annotations

from typing import Any, TypedDict

Target = int | str | dict[str, Any]
"""A class index, a label, a rank such as `top1`, or a contrast `{"class": 281, "against": [282]}`."""


class CommonOptions(TypedDict, total=False):
    """Options of every operation."""

    model: str
    interventions: list[dict[str, Any]]
    timeout_s: float


class PredictOptions(CommonOptions, total=False):
    """Options of `predict`."""

    labels: list[str]
    top_k: int
    statistics: bool


class CompareOptions(CommonOptions, total=False):
    """Options of `compare`."""

    methods: list[str]
    layers: list[str]
    fuse: str
    outputs: list[str]
    canvas: str
    colormap: str
    clip: str | float
    alpha: float
    overlay_format: str
    samples: int
    steps: int
    seed: int


class ExplainOptions(CompareOptions, total=False):
    """Options of `explain`."""

    labels: list[str]
    top_k: int
    targets: list[Target]
    statistics: bool
    faithfulness: list[str]
    curves: bool


class FeaturesOptions(CommonOptions, total=False):
    """Options of `features`."""

    labels: list[str]
    targets: list[Target]
    layers: list[str]
    kinds: list[str]
    channels: int
    grid: bool
    colormap: str
