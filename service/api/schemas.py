"""Every response of the API, field by field.

msgspec encodes the structs straight to JSON and the OpenAPI components are generated from them, so
the two cannot drift apart. Where the wire shows a result of the engine, the engine's own struct is
the response, or its base. Fields that may be absent are `UNSET`.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from msgspec import UNSET, Meta, UnsetType

from models.imaging.locate import Box
from models.types import (
    ClassScore,
    Faithfulness,
    LayerStatistics,
    ModelCard,
    ModelState,
    Precision,
    Preprocess,
    Region,
    Struct,
)
from service.devices.pool import DeviceReport

Milliseconds = Annotated[float, Meta(description="Milliseconds.", examples=[2.1])]
Base64 = Annotated[str, Meta(description="Base64 of the bytes.")]

S = TypeVar("S", bound=Struct)


def derive(kind: type[S], source: Struct, **fields: Any) -> S:
    """Make a response from the fields that it shares with another struct, and those given here."""
    shared = [name for name in kind.__struct_fields__ if name in source.__struct_fields__]
    return kind(**{**{name: getattr(source, name) for name in shared}, **fields})


class ImageError(Struct):
    """The reason why one image of several failed."""

    error: Annotated[str, Meta(description="Fixed human-readable text.")]
    code: Annotated[
        str, Meta(description="Stable code to program against.", examples=["invalid_option"])
    ]


class ErrorResponse(ImageError):
    """The reason why a request failed."""

    request_id: str
    retryable: Annotated[bool, Meta(description="Whether the same request may succeed later.")]
    field: (
        Annotated[str, Meta(description="The offending option.", examples=["methods.0"])]
        | UnsetType
    ) = UNSET


class ModelUsed(Struct):
    """The model that answered."""

    name: Annotated[str, Meta(examples=["efficientnet_lite0"])]
    version: Annotated[str, Meta(examples=["1"])]
    device: Annotated[
        str, Meta(description="Where it ran; several are comma-separated.", examples=["cpu"])
    ]
    precision: Precision


class ImageInfo(Struct):
    """The upright image, and the part of it that the model saw."""

    width: int
    height: int
    region: Region


class Prediction(ClassScore):
    """One class: logit and probability (sigmoid for multi-label and single-logit models)."""

    probability: Annotated[float, Meta(ge=0, le=1, examples=[0.61])]
    label: Annotated[str, Meta(examples=["tabby"])]


class ImageData(Struct):
    """An encoded image."""

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
    """Minimum and maximum of the raw map."""

    min: float
    max: float


class Point(Struct):
    """The peak of the map, in pixels of the original image."""

    x: float
    y: float


class ExplanationResponse(Struct, kw_only=True):
    """One map: a method, a layer and a target."""

    method: Annotated[str, Meta(examples=["gradcam"])]
    layer: str
    target: Prediction
    area: (
        Annotated[int, Meta(description="Number of the target's area among the image's, from 0.")]
        | UnsetType
    ) = UNSET
    heatmap: ImageData | UnsetType = UNSET
    overlay: ImageData | UnsetType = UNSET
    values: Values | UnsetType = UNSET
    range: ValueRange
    signed: Annotated[
        bool, Meta(description="Whether negative values are evidence against the class.")
    ]
    degenerate: Annotated[bool, Meta(description="Whether the map is constant and shows nothing.")]
    peak: Point | None
    box: Box | None
    faithfulness: dict[str, Faithfulness] = {}
    warnings: tuple[str, ...] = ()


# No base of the one above: the fields of a base come first, and `target` is the third on the wire.
class MapResponse(Struct, kw_only=True):
    """One map: a method and a layer."""

    method: Annotated[str, Meta(examples=["gradcam"])]
    layer: str
    heatmap: ImageData | UnsetType = UNSET
    overlay: ImageData | UnsetType = UNSET
    values: Values | UnsetType = UNSET
    range: ValueRange
    signed: Annotated[
        bool, Meta(description="Whether negative values are evidence against the class.")
    ]
    degenerate: Annotated[bool, Meta(description="Whether the map is constant and shows nothing.")]
    peak: Point | None
    box: Box | None
    warnings: tuple[str, ...] = ()


class StatisticsResponse(LayerStatistics):
    """Statistics of one image's tensor at one layer."""

    grid: ImageData | UnsetType = UNSET


class _Result(Struct):
    error: ImageError | UnsetType = UNSET
    image: ImageInfo | UnsetType = UNSET
    predictions: tuple[Prediction, ...] | UnsetType = UNSET
    warnings: tuple[str, ...] | UnsetType = UNSET


class PredictResult(_Result):
    """One image; `error` replaces the rest where one of several images is bad."""

    statistics: tuple[StatisticsResponse, ...] | UnsetType = UNSET


class ExplainResult(_Result):
    """One image; `error` replaces the rest where one of several images is bad."""

    explanations: tuple[ExplanationResponse, ...] | UnsetType = UNSET
    statistics: tuple[StatisticsResponse, ...] | UnsetType = UNSET


class FeaturesResult(_Result):
    """One image; `error` replaces the rest where one of several images is bad."""

    features: tuple[StatisticsResponse, ...] | UnsetType = UNSET


class CompareResult(_Result):
    """One image of two that are compared: what makes it similar to the other."""

    explanations: tuple[MapResponse, ...] | UnsetType = UNSET


Result = PredictResult | ExplainResult | FeaturesResult | CompareResult


class Timings(Struct):
    """Milliseconds of each stage; of several images, those of the slowest."""

    decode: Milliseconds
    queue: Milliseconds
    device: Milliseconds
    render: Milliseconds
    total: Milliseconds


STAGES = ("decode", "queue", "device", "render")
"""The stages of `Timings`, in order."""

BatchSize = Annotated[int, Meta(description="Images in the device's batch.")]


class _Response(Struct):
    request_id: str
    model: ModelUsed


class PredictResponse(_Response):
    """Predictions, one result per image in order."""

    results: tuple[PredictResult, ...]
    timings_ms: Timings
    batch_size: BatchSize


class ExplainResponse(_Response):
    """Predictions and explanations, one result per image in order."""

    results: tuple[ExplainResult, ...]
    timings_ms: Timings
    batch_size: BatchSize


class CompareResponse(_Response):
    """The similarity of two images, and for each of them, in order, what makes them similar."""

    similarity: Annotated[
        float, Meta(description="Cosine of the two vectors.", ge=-1, le=1, examples=[0.83])
    ]
    results: tuple[CompareResult, CompareResult]
    timings_ms: Timings
    batch_size: BatchSize


class ProgressEvent(Struct):
    """Data of the event `progress`."""

    what: Annotated[
        str,
        Meta(
            description="What is being done: `queued`, a method, or `faithfulness`.",
            examples=["rise"],
        ),
    ]
    done: Annotated[
        int,
        Meta(description="Images run through the network; a gradient counts as three."),
    ]
    total: Annotated[int, Meta(description="Images in the end; 0 while nothing is known.")]
    seconds_left: Annotated[
        float | None, Meta(description="Expected time; null while nothing is known.")
    ]


class PartialEvent(Struct):
    """Data of the event `partial`: what a map shows so far."""

    image: Annotated[int, Meta(description="Number of the image, from 0.")]
    explanation: ExplanationResponse


class FeaturesResponse(_Response):
    """Statistics of layers, one result per image in order."""

    results: tuple[FeaturesResult, ...]
    timings_ms: Timings
    batch_size: BatchSize


class InputResponse(Preprocess, kw_only=True):
    """The preprocessing of images, and the size of the model's input."""

    height: int
    width: int


class CardResponse(ModelCard):
    """A model card; a model that is not ready says why in `reason`."""

    input: InputResponse | None = None
    cause: str | UnsetType = UNSET  # type: ignore[assignment] # for administrators


class ModelsResponse(Struct):
    """Every configured model."""

    models: tuple[str, ...]
    default: str
    cards: tuple[CardResponse, ...]


class AliveResponse(Struct, kw_only=True):
    """The process is alive."""

    status: Annotated[str, Meta(examples=["alive"])]
    name: str = "heatlens"
    version: str
    docs: str = "/docs"


class DeviceReadiness(DeviceReport, kw_only=True):
    """The readiness of one device."""

    ready: bool


class ModelReadiness(Struct):
    """The readiness of one model version."""

    name: str
    version: str
    state: ModelState
    ready: bool
    reason: str | None


class ReadyResponse(Struct):
    """Readiness to answer requests, and everything that is missing."""

    ready: bool
    missing: tuple[str, ...]
    devices: tuple[DeviceReadiness, ...]
    models: tuple[ModelReadiness, ...]


class RepositoryModel(Struct):
    """One model version in the format of Triton's model repository."""

    name: str
    version: str
    state: Annotated[str, Meta(examples=["READY", "UNAVAILABLE", "LOADING", "UNLOADING"])]
    reason: str
