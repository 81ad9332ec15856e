"""The answers, field by field: what is encoded is what OpenAPI documents.

Structs are encoded straight to JSON by msgspec, and the OpenAPI components are generated from the
same definitions, so that the two cannot drift apart. Fields that may be absent are `UNSET`.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from models.methods.table import Cost, Family
from models.types import (
    ChannelStatistics,
    Faithfulness,
    HeadKind,
    Kind,
    MethodSupport,
    ModelState,
    Precision,
    Quantiles,
    Struct,
    Task,
)

Milliseconds = Annotated[float, Meta(description="Milliseconds.", examples=[2.1])]
Base64 = Annotated[str, Meta(description="Base64 of the bytes.")]


class ErrorResponse(Struct):
    """Why a request failed."""

    error: Annotated[str, Meta(description="Fixed human text.")]
    code: Annotated[
        str, Meta(description="Stable code to program against.", examples=["invalid_option"])
    ]
    request_id: str
    retryable: Annotated[bool, Meta(description="Whether the same request may succeed later.")]
    field: (
        Annotated[str, Meta(description="The option to blame.", examples=["methods.0"])] | UnsetType
    ) = UNSET


class ImageError(Struct):
    """Why one image of several failed."""

    code: Annotated[str, Meta(examples=["image_undecodable"])]
    error: str


class ModelUsed(Struct):
    """The model that answered."""

    name: Annotated[str, Meta(examples=["efficientnet_lite0"])]
    version: Annotated[str, Meta(examples=["1"])]
    device: Annotated[
        str, Meta(description="Where it ran; several, comma-separated.", examples=["cpu"])
    ]
    precision: Precision


class PixelRegion(Struct):
    """A rectangle in pixels of the original, upright picture."""

    x: float
    y: float
    width: float
    height: float


class ImageInfo(Struct):
    """The picture as it was sent, upright, and the part of it that the model saw."""

    width: int
    height: int
    region: PixelRegion


class Prediction(Struct):
    """One class: logit and probability (softmax; sigmoid for multi-label and single-logit models)."""

    class_id: Annotated[int, Meta(examples=[281])]
    label: Annotated[str, Meta(examples=["tabby"])]
    score: Annotated[float, Meta(examples=[9.21])]
    probability: Annotated[float, Meta(ge=0, le=1, examples=[0.61])]


class ImageData(Struct):
    """An encoded picture."""

    media_type: Annotated[str, Meta(examples=["image/png"])]
    width: int
    height: int
    data: Base64


class Values(Struct):
    """The raw map before normalising: float32, little-endian, row-major."""

    shape: tuple[int, int]
    dtype: Annotated[str, Meta(examples=["float32"])]
    data: Base64


class ValueRange(Struct):
    """Least and greatest value of the raw map."""

    min: float
    max: float


class Point(Struct):
    """Where the map is greatest, in pixels of the original picture."""

    x: float
    y: float


class Box(Struct):
    """The rectangle around the strongest part of the map, in pixels of the original picture."""

    x: int
    y: int
    width: int
    height: int


class ExplanationResponse(Struct, kw_only=True):
    """One map: a method, a layer and a target."""

    method: Annotated[str, Meta(examples=["gradcam"])]
    layer: str
    target: Prediction
    heatmap: ImageData | UnsetType = UNSET
    overlay: ImageData | UnsetType = UNSET
    values: Values | UnsetType = UNSET
    range: ValueRange
    signed: Annotated[
        bool, Meta(description="Whether negative values are evidence against the class.")
    ]
    degenerate: Annotated[
        bool, Meta(description="Whether the map is constant, and so shows nothing.")
    ]
    peak: Point | None
    box: Box | None
    faithfulness: dict[str, Faithfulness] = {}
    warnings: tuple[str, ...] = ()


class StatisticsResponse(Struct):
    """Statistics of one image's tensor at one layer."""

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
    top_channels: tuple[ChannelStatistics, ...]
    target: Annotated[int, Meta(description="Class whose gradient this is.")] | UnsetType = UNSET
    grid: ImageData | UnsetType = UNSET


class PredictResult(Struct):
    """One image; `error` replaces the rest where one of several is bad."""

    image: ImageInfo | UnsetType = UNSET
    predictions: tuple[Prediction, ...] | UnsetType = UNSET
    statistics: tuple[StatisticsResponse, ...] | UnsetType = UNSET
    warnings: tuple[str, ...] | UnsetType = UNSET
    error: ImageError | UnsetType = UNSET


class ExplainResult(Struct):
    """One image; `error` replaces the rest where one of several is bad."""

    image: ImageInfo | UnsetType = UNSET
    predictions: tuple[Prediction, ...] | UnsetType = UNSET
    explanations: tuple[ExplanationResponse, ...] | UnsetType = UNSET
    statistics: tuple[StatisticsResponse, ...] | UnsetType = UNSET
    warnings: tuple[str, ...] | UnsetType = UNSET
    error: ImageError | UnsetType = UNSET


class FeaturesResult(Struct):
    """One image; `error` replaces the rest where one of several is bad."""

    image: ImageInfo | UnsetType = UNSET
    predictions: tuple[Prediction, ...] | UnsetType = UNSET
    features: tuple[StatisticsResponse, ...] | UnsetType = UNSET
    warnings: tuple[str, ...] | UnsetType = UNSET
    error: ImageError | UnsetType = UNSET


Result = PredictResult | ExplainResult | FeaturesResult


class Timings(Struct):
    """Milliseconds per stage; of several images, the slowest one's."""

    decode: Milliseconds
    queue: Milliseconds
    device: Milliseconds
    render: Milliseconds
    total: Milliseconds


class _Response(Struct):
    request_id: str
    model: ModelUsed


class PredictResponse(_Response):
    """Predictions, one result per image in order."""

    results: tuple[PredictResult, ...]
    timings_ms: Timings
    batch_size: Annotated[int, Meta(description="Images in the device's batch that answered.")]


class ExplainResponse(_Response):
    """Predictions and explanations, one result per image in order."""

    results: tuple[ExplainResult, ...]
    timings_ms: Timings
    batch_size: Annotated[int, Meta(description="Images in the device's batch that answered.")]


class FeaturesResponse(_Response):
    """Statistics of layers, one result per image in order."""

    results: tuple[FeaturesResult, ...]
    timings_ms: Timings
    batch_size: Annotated[int, Meta(description="Images in the device's batch that answered.")]


# ---------------------------------------------------------------- listings


class InputResponse(Struct):
    """What pictures become before they enter the model."""

    height: int
    width: int
    resize: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


class CardResponse(Struct):
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
    input: InputResponse | None
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


class ModelsResponse(Struct):
    """Every configured model."""

    models: tuple[str, ...]
    default: str
    cards: tuple[CardResponse, ...]


class MethodResponse(Struct):
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


class AliveResponse(Struct, kw_only=True):
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


class ReadyResponse(Struct):
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
