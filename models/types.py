"""The data that flows through Heatlens: jobs in, outcomes out. No torch here.

All structures are frozen `msgspec.Struct`s, so that they cross a process boundary as msgpack
(arrays travel as raw frames beside the header, see `service/devices/messages.py`). Times are
seconds on the machine-wide monotonic clock (`time.monotonic`), durations say their unit in their
name.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import UNSET, Meta, UnsetType

from models.errors import HeatlensError
from models.image_types import Fit, Geometry, Order, Preprocess, Region, Struct, TextInput

__all__ = ["Fit", "Geometry", "Order", "Preprocess", "Region", "Struct", "TextInput"]

Operation = Literal["predict", "explain", "features", "compare"]
Task = Literal["single_label", "multi_label", "binary", "segmentation", "embedding", "zero_shot"]
Precision = Literal["fp32", "bf16", "fp16"]
Fuse = Literal["none", "mean", "max", "product"]
Kind = Literal["output", "input", "grad_output", "grad_input"]
HeadKind = Literal["gap_linear", "gap", "flatten", "token"]
ModelState = Literal["loading", "ready", "unavailable", "unloading"]
InterventionOp = Literal["zero", "mean", "scale"]
ModelKey = tuple[str, str]
"""Name and version."""

STEP_MS = 250.0
"""Device time that one step of a job should take at most, since others wait for it."""

STEP_BYTES = 64_000_000
"""Memory for tensors that one step of a job should keep at most."""


# ---------------------------------------------------------------- jobs


class ClassRef(Struct):
    """A class by `kind` index (`value` from 0) or rank (`value` from 1).

    A class within area number a of its image, from 1, has a · classes added to its value.
    """

    kind: Literal["index", "rank"]
    value: int


class Target(Struct):
    """What is explained: the score of `cls`, less the mean score of the classes in `against`."""

    cls: ClassRef
    against: tuple[ClassRef, ...] = ()


TOP1 = Target(cls=ClassRef(kind="rank", value=1))


class Intervention(Struct):
    """Channels of a layer's output that are changed during the pass.

    `zero` sets them to 0, `mean` to their spatial mean, `scale` multiplies them by `value`.
    """

    layer: str
    channels: tuple[int, ...]
    op: InterventionOp
    value: float = 1.0


class JobOptions(Struct):
    """What one image's job asks for, resolved against a model: no label, glob or `auto` is left.

    Attributes:
        top_k: number of predictions to return.
        targets: classes to explain (or whose gradients `features` wants).
        methods: names of METHODS rows, for `explain`.
        layers: dotted module names: explained layers, or the layers of `features`.
        fuse: how maps of several layers become one.
        statistics: whether to return statistics of `layers`' outputs.
        kinds: which tensors of each layer `features` reduces.
        channels: how many top channels a statistic lists.
        grid: whether `features` returns the top channels' maps, to be drawn as a grid.
        interventions: channels changed during the pass.
        labels: texts that are the classes, of a model of the task `zero_shot`; empty for its own.
        faithfulness: names of faithfulness measures per explanation.
        curves: whether to return the curves that they are made from.
        samples, steps, seed: of stochastic and path methods; None = the method's default.
    """

    top_k: int = 5
    targets: tuple[Target, ...] = (TOP1,)
    methods: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    fuse: Fuse = "none"
    statistics: bool = False
    kinds: tuple[Kind, ...] = ("output",)
    channels: int = 16
    grid: bool = False
    interventions: tuple[Intervention, ...] = ()
    labels: tuple[str, ...] = ()
    faithfulness: tuple[str, ...] = ()
    curves: bool = False
    samples: int | None = None
    steps: int | None = None
    seed: int | None = None


class Job(Struct):
    """One image to run through one model.

    Attributes:
        id: unique per job.
        operation: what is asked.
        model: catalog name.
        version: version of that model.
        input: the model input: pixels before normalising, uint8 (height, width, channels), or values
            after it, float32 (channels, height, width).
        areas: uint8 (areas, height, width) of 0 and 1, the areas of the input that targets name.
        other: an image that this one is compared with, as `input`. Without it, a prediction by a model
            of the task `embedding` is the image's vector.
        reference: float32 (values,), the vector of that image, where it is known.
    """

    id: str
    operation: Operation
    model: str
    version: str
    input: np.ndarray
    options: JobOptions
    areas: np.ndarray | None = None
    other: np.ndarray | None = None
    reference: np.ndarray | None = None

    @property
    def model_key(self) -> ModelKey:
        """Name and version of the model."""
        return self.model, self.version


# ---------------------------------------------------------------- outcomes


class ClassScore(Struct):
    """A class with its score (logit) and probability (softmax or sigmoid, by the model's task)."""

    class_id: Annotated[int, Meta(examples=[281])]
    score: Annotated[float, Meta(examples=[9.21])]
    probability: Annotated[float, Meta(examples=[0.61])]


class Curve(Struct):
    """What a measure is made from: a value of the map and of a random one at each share, 0 to 1."""

    share: tuple[float, ...]
    value: tuple[float, ...]
    random: tuple[float, ...]


class Faithfulness(Struct):
    """A faithfulness measure of a map, and the same measure of a random map."""

    value: float
    random: float
    curve: Curve | UnsetType = UNSET


class Explanation(Struct):
    """One map for one method, layer and target.

    Attributes:
        layer: explained layer; fused layers are joined by `+`; empty for methods of the input
            itself.
        map: float32 (h, w) before normalising, at the layer's resolution.
        signed: whether negative values mean evidence against the class.
        degenerate: whether the map is constant, and so shows nothing.
    """

    method: str
    layer: str
    target: ClassScore
    map: np.ndarray
    signed: bool
    degenerate: bool
    faithfulness: dict[str, Faithfulness] = {}
    warnings: tuple[str, ...] = ()


class Quantiles(Struct):
    """Values below which 1, 25, 50, 75 and 99 % of a tensor's values lie."""

    p01: float
    p25: float
    p50: float
    p75: float
    p99: float


class ChannelStatistics(Struct):
    """One feature map: its statistics, and its weight in the explaining method if it has one."""

    index: int
    mean: float
    max: float
    weight: float | None = None


class LayerStatistics(Struct):
    """Statistics of one image's tensor at one layer.

    Attributes:
        shape: of the tensor, without the batch dimension.
        target: class whose gradient this is, for `grad_*` kinds.
    """

    layer: str
    kind: Kind
    shape: tuple[int, ...]
    mean: float
    std: float
    min: float
    max: float
    l2: float
    sparsity: Annotated[float, Meta(description="Share of values that are exactly 0.")]
    dead_channels: Annotated[int, Meta(description="Channels whose values are all 0.")]
    quantiles: Quantiles
    top_channels: tuple[ChannelStatistics, ...] = ()
    target: Annotated[int, Meta(description="Class whose gradient this is.")] | UnsetType = UNSET


class LayerFeatures(LayerStatistics):
    """Statistics of one layer with the maps of its top channels.

    Attributes:
        grid: float32 (channels, h, w) maps of `top_channels`; None if no grid was asked for.
    """

    grid: np.ndarray | None = None


class Outcome(Struct):
    """The result of a job.

    Attributes:
        explanations: of two images that are compared, those of the first and then of the second.
        embedding: float32 (values,), of a model of the task `embedding`.
    """

    id: str
    predictions: tuple[ClassScore, ...]
    explanations: tuple[Explanation, ...] = ()
    statistics: tuple[LayerFeatures, ...] = ()
    embedding: np.ndarray | None = None


class Progress(Struct):
    """How far a job has come: `done` of `total` images, a gradient counting as three.

    `what` is a method or `faithfulness`; `explanations` are what its maps show so far.
    """

    what: str
    done: int
    total: int
    explanations: tuple[Explanation, ...] = ()


class Failure(Struct):
    """The typed error that ends a job; `code` is a key of `models.errors.ERRORS`."""

    id: str
    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, job_id: str, error: HeatlensError) -> Failure:
        """The failure that ends `job_id` (or a request of that id) with `error`."""
        return cls(
            id=job_id,
            code=error.code,
            message=error.message,
            field=error.field,
            retry_after_s=error.retry_after_s,
        )


# ---------------------------------------------------------------- models


class MethodSupport(Struct):
    """Whether a method can explain a model, and if not, why."""

    name: str
    applicable: bool
    reason: str | None = None


class LayerInfo(Struct):
    """One module that can be hooked, as `/v1/models/{name}/layers` lists it.

    Attributes:
        output_shape: of the probe's output without the batch dimension; empty if it is not one
            tensor.
        spatial: whether the output is a map (channels, h, w), or tokens that can be laid out as
            one.
        parameters: number of parameters in the module and below.
        recommended: whether this is the model's `auto` target layer.
        calls: how often it is called in a pass.
        usable: whether it was proved that it can be described and changed.
        reason: why it is not usable, or not spatial; empty if it is both.
    """

    name: str
    type: str
    output_shape: tuple[int, ...]
    spatial: bool
    parameters: int
    recommended: bool = False
    calls: int = 1
    usable: bool = True
    reason: str = ""


class ModelCard(Struct):
    """What is known of one model version; unready models carry `reason` and few other fields.

    Attributes:
        cause: the cause of a failed load, for the operator alone; it may quote the operator's code.
        notes: what the network does other than usual, and what was done about it, as sentences.
    """

    name: str
    version: str
    state: ModelState
    ready: bool
    source: str
    devices: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    reason: str | None = None
    cause: str | None = None
    num_classes: int = 0
    task: Task = "single_label"
    input: Preprocess | None = None
    texts: TextInput | None = None
    target_layer: str | None = None
    head: HeadKind | None = None
    closed_form: bool = False
    methods: tuple[MethodSupport, ...] = ()
    precision: Precision = "fp32"
    preparation: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    best_batch: int = 1
    latency_ms: Annotated[
        dict[int, float], Meta(description="Measured milliseconds by batch size.")
    ] = {}

    @property
    def key(self) -> ModelKey:
        """Name and version."""
        return self.name, self.version

    @property
    def full_name(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class ModelInfo(Struct, dict=True):
    """A card with everything that is not part of it.

    Attributes:
        fingerprint: digest of what requests are resolved against (labels, layers, input, …); it
            changes when a version is replaced by another model.
    """

    card: ModelCard
    labels: tuple[str, ...] = ()
    layers: tuple[LayerInfo, ...] = ()
    feature_layers: tuple[str, ...] = ()
    fingerprint: str = ""

    @cached_property
    def places(self) -> dict[str, int]:
        """Place of each layer in `layers`, by name."""
        return {layer.name: place for place, layer in enumerate(self.layers)}

    @cached_property
    def prices(self) -> dict[object, Any]:
        """Prices of its jobs that are remembered; a changed model has none yet."""
        return {}
