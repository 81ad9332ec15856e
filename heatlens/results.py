"""Typed results: images as PIL images, maps as numpy arrays; they show themselves in notebooks."""

from __future__ import annotations

import base64
import io
from typing import Any, TypeVar, dataclass_transform

import msgspec
import numpy as np
from PIL import Image

from heatlens import html
from heatlens.errors import APIError


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class _Struct(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that a newer service adds are passed over."""


class Region(_Struct):
    """A rectangle in pixels of the original image; it may reach beyond it where the input is padded."""

    x: float
    y: float
    width: float
    height: float


class Box(_Struct):
    """A rectangle in whole pixels of the original image."""

    x: int
    y: int
    width: int
    height: int


class Point(_Struct):
    """A point in pixels of the original image."""

    x: float
    y: float


class ImageInfo(_Struct):
    """The size of the upright image in pixels, and the region that the model saw."""

    width: int
    height: int
    region: Region


class Prediction(_Struct):
    """A class with its score (the logit) and its probability, 0 to 1."""

    class_id: int
    label: str
    score: float
    probability: float


class Range(_Struct):
    """The least and the greatest value of a map."""

    min: float
    max: float


class Faithfulness(_Struct):
    """A measure of faithfulness, and the same measure of a random map."""

    value: float | None = None
    random: float | None = None
    curve: dict[str, list[float]] | None = None


class Map(_Struct, kw_only=True):
    """A map by one method at one layer.

    Attributes:
        heatmap: RGBA, to be laid over the image.
        overlay: the heatmap blended with the image.
        values: float32 (h, w), the map before it is normalised; ask with `outputs=["values"]`.
        range: of the values.
        signed: whether negative values are evidence against what is explained.
        degenerate: whether the map is constant and shows nothing.
        peak: where the map is strongest.
        box: around the peak, the connected pixels that reach half of it.
    """

    method: str
    layer: str
    heatmap: Image.Image | None = None
    overlay: Image.Image | None = None
    values: np.ndarray | None = None
    range: Range
    signed: bool = False
    degenerate: bool = False
    peak: Point | None = None
    box: Box | None = None
    warnings: list[str] = []

    def _repr_png_(self) -> bytes | None:
        shown = self.overlay or self.heatmap
        return None if shown is None else html.png(shown)


class Explanation(Map, kw_only=True):
    """A map that explains one class.

    Attributes:
        area: number of the target's area among those of the image, from 0; None if it has none.
    """

    target: Prediction
    area: int | None = None
    faithfulness: dict[str, Faithfulness] = {}


class Channel(_Struct):
    """A channel of a layer."""

    index: int
    mean: float
    max: float
    weight: float | None = None


class Statistics(_Struct, kw_only=True):
    """Statistics of one image's tensor at one layer.

    Attributes:
        kind: `output`, `input`, `grad_output` or `grad_input`.
        shape: without the batch.
        sparsity: share of zeros, 0 to 1.
        dead_channels: number of channels that are zero everywhere.
        grid: the top channels as one image.
    """

    layer: str
    kind: str
    shape: list[int]
    mean: float
    std: float
    min: float
    max: float
    l2: float
    sparsity: float
    dead_channels: int | None = None
    quantiles: dict[str, float] = {}
    top_channels: list[Channel] = []
    grid: Image.Image | None = None


class ImageError(_Struct):
    """The reason why one image of several failed."""

    code: str
    error: str


class Result(_Struct, kw_only=True):
    """The result of one image; `error` stands in place of the rest if the image is bad."""

    error: ImageError | None = None
    image: ImageInfo | None = None
    predictions: list[Prediction] = []
    explanations: list[Explanation] = []
    statistics: list[Statistics] = []
    features: list[Statistics] = []
    warnings: list[str] = []

    def _repr_html_(self) -> str:
        return html.result(self)


class ModelUsed(_Struct):
    """The model that answered."""

    name: str
    version: str
    device: str
    precision: str


class _Response(_Struct, kw_only=True):
    """What every response says.

    Attributes:
        timings_ms: milliseconds of each stage; of several images, those of the slowest.
        batch_size: images in the device's batch.
    """

    request_id: str
    model: ModelUsed
    timings_ms: dict[str, float] = {}
    batch_size: int = 1


class Response(_Response, kw_only=True):
    """A response: one result for each image, in order."""

    results: list[Result]

    @property
    def result(self) -> Result:
        """The result of the first image.

        Raises:
            APIError: this image is bad.
        """
        first = self.results[0]
        if first.error is not None:
            raise APIError(
                first.error.error, code=first.error.code, status=422, request_id=self.request_id
            )
        return first

    @property
    def predictions(self) -> list[Prediction]:
        """The predictions for the first image, the most probable first."""
        return self.result.predictions

    @property
    def top1(self) -> Prediction:
        """The most probable class of the first image."""
        return self.predictions[0]

    def _repr_html_(self) -> str:
        return "".join(html.result(result) for result in self.results)


class PredictResponse(Response, kw_only=True):
    """The response to `predict`."""


class ExplainResponse(Response, kw_only=True):
    """The response to `explain`."""

    @property
    def explanations(self) -> list[Explanation]:
        """The explanations of the first image: method by method, target by target, layer by layer."""
        return self.result.explanations

    @property
    def explanation(self) -> Explanation:
        """The first explanation of the first image."""
        return self.explanations[0]


class FeaturesResponse(Response, kw_only=True):
    """The response to `features`."""

    @property
    def features(self) -> list[Statistics]:
        """The statistics of the first image, layer by layer."""
        return self.result.features


class Compared(_Struct, kw_only=True):
    """One image of two that were compared: what makes it similar to the other."""

    image: ImageInfo
    explanations: list[Map]
    warnings: list[str] = []


class CompareResponse(_Response, kw_only=True):
    """The response to `compare`: `similarity` is the cosine of the two images' vectors, -1 to 1."""

    similarity: float
    results: list[Compared]


class MethodSupport(_Struct):
    """Whether a method can explain a model, and if not, why."""

    name: str
    applicable: bool
    reason: str | None = None


class ModelCard(_Struct, kw_only=True):
    """What the service says of a model.

    Attributes:
        state: `ready`, `loading`, `unavailable`, …; `reason` says why it is not ready.
        target_layer: the recommended layer.
        latency_ms: milliseconds of a forward pass by batch size.
        notes: what loading had to assume.
    """

    name: str
    version: str
    state: str
    ready: bool
    reason: str | None = None
    source: str = ""
    num_classes: int | None = None
    task: str | None = None
    input: dict[str, Any] | None = None
    target_layer: str | None = None
    methods: list[MethodSupport] = []
    precision: str | None = None
    best_batch: int | None = None
    latency_ms: dict[str, float] = {}
    notes: list[str] = []


class Models(_Struct):
    """Every configured model."""

    default: str
    cards: list[ModelCard]

    def default_first(self) -> list[ModelCard]:
        """The cards, those of the default model first."""
        return sorted(self.cards, key=lambda card: card.name != self.default)


class Layer(_Struct, kw_only=True):
    """A layer of a model."""

    name: str
    type: str
    output_shape: list[int] | None = None
    spatial: bool = False
    parameters: int = 0
    recommended: bool = False
    reason: str | None = None


class Progress(_Struct, kw_only=True):
    """How far a request is.

    Attributes:
        what: the work at hand.
        done, total: steps; `total` is 0 while it is unknown.
        seconds_left: an estimate, if there is one.
    """

    what: str
    done: int
    total: int
    seconds_left: float | None = None

    @property
    def share(self) -> float:
        """How much of the work is done, 0 to 1."""
        return self.done / self.total if self.total else 0.0


class PartialMap(_Struct):
    """What a map of a long method shows so far; `image` is the number of its image, from 0."""

    image: int
    explanation: Explanation


T = TypeVar("T")


def decode(data: bytes, kind: type[T]) -> T:
    """Decode a response."""
    return msgspec.json.decode(data, type=kind, dec_hook=_decode_custom)


def _decode_custom(kind: type, value: Any) -> Any:
    """Make an image or an array from what the wire says of it."""
    data = base64.b64decode(value["data"])
    if kind is np.ndarray:
        return np.frombuffer(data, "<f4").reshape(value["shape"])
    return Image.open(io.BytesIO(data))
