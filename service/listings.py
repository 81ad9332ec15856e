"""Answers about the service itself: models, methods, health. See `service.schemas` for how they are encoded."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from models.methods.table import Cost, Family
from models.types import HeadKind, MethodSupport, ModelState, Precision, Struct, Task


class InputAnswer(Struct):
    """What pictures become before they enter the model."""

    height: int
    width: int
    resize: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


class CardAnswer(Struct):
    """A model card; a model that is not ready says why in `reason`."""

    name: str
    version: str
    ready: bool
    state: ModelState
    reason: str | None
    versions: tuple[str, ...]
    devices: tuple[str, ...]
    source: str
    num_classes: int
    task: Task
    input: InputAnswer | None
    target_layer: str | None
    head: HeadKind | None
    closed_form: bool
    methods: tuple[MethodSupport, ...]
    precision: Precision
    preparation: tuple[str, ...]
    best_batch: int
    latency_ms: Annotated[
        dict[str, float], Meta(description="Measured milliseconds by batch size.")
    ]


class ModelsAnswer(Struct):
    """Every configured model."""

    models: tuple[str, ...]
    default: str
    cards: tuple[CardAnswer, ...]


class MethodAnswer(Struct):
    """One explanation method."""

    name: str
    title: str
    paper: str
    formula: str
    family: Family
    needs_gradients: bool
    signed: bool
    cost: Cost
    defaults: dict[str, Any]


# ---------------------------------------------------------------- health


class AliveAnswer(Struct, kw_only=True):
    """The process answers."""

    status: Annotated[str, Meta(examples=["alive"])]
    name: str = "heatlens"
    version: str
    docs: str = "/docs"


class DeviceReadiness(Struct):
    """One device."""

    device: str
    state: str
    ready: bool
    last_pass_s: Annotated[float | None, Meta(description="Seconds since its last completed pass.")]
    queue_depth: int
    models: tuple[str, ...]
    restarts: int


class ModelReadiness(Struct):
    """One model version."""

    name: str
    version: str
    state: ModelState
    ready: bool
    reason: str | None


class ReadyAnswer(Struct):
    """Whether requests can be answered, and what is missing."""

    ready: bool
    missing: tuple[str, ...]
    devices: tuple[DeviceReadiness, ...]
    models: tuple[ModelReadiness, ...]


# ---------------------------------------------------------------- administration


class RepositoryModel(Struct):
    """One model version, as Triton's model repository lists it."""

    name: str
    version: str
    state: Annotated[str, Meta(examples=["READY", "UNAVAILABLE", "LOADING", "UNLOADING"])]
    reason: str
