"""The options of a request: names, ranges, defaults and descriptions, one model per operation.

`service.api.json` checks values against them. What depends on the network (labels, layers,
applicable methods) is resolved in `service.api.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, WithJsonSchema

from models.areas import FORMS, MASK
from models.imaging.render import OverlayFormat
from models.imaging.style import MAX_CLIP, ClipChoice, ColormapChoice
from models.methods import METHODS
from models.types import Fuse, InterventionOp, Kind, Operation

Output = Literal["heatmap", "overlay", "values"]
CanvasName = Literal["input", "original"]
Measure = Literal["average_drop", "increase", "deletion", "insertion", "road"]

MAX_TARGETS = 16
MAX_AGAINST = 1000
MAX_MASKS = 32
MAX_LABELS = 256
MAX_SCALE = 1e6
_MAX_NAME = 512

_CLASS_SCHEMAS = [{"type": "integer", "minimum": 0}, {"type": "string", "minLength": 1}]
_CLASS_SCHEMA = {"anyOf": _CLASS_SCHEMAS}
_CONTRAST_SCHEMA = {
    "type": "object",
    "properties": {
        "class": _CLASS_SCHEMA,
        "against": {"type": "array", "items": _CLASS_SCHEMA, "maxItems": MAX_AGAINST},
        **{
            form: {
                "type": "object",
                "properties": {side: {"type": "number"} for side in sides},
                "required": list(sides),
                "additionalProperties": False,
            }
            for form, sides in FORMS.items()
        },
        MASK: {"type": "string", "description": "Base64 of a PNG, stretched over the image."},
    },
    "required": ["class"],
    "additionalProperties": False,
}
_TARGET_SCHEMA: dict[str, Any] = {
    "description": "A class index, a label, a rank from `top1` to `top10`, or a contrast. Of a "
    "segmentation network also a class within a `box`, `point` or `mask` of the image.",
    "anyOf": [*_CLASS_SCHEMAS, _CONTRAST_SCHEMA],
}


def count_against(targets: Sequence[object]) -> int:
    """Classes that the contrasts among raw targets name to be held against."""
    lists = (target.get("against") for target in targets if isinstance(target, Mapping))
    return sum(len(against) for against in lists if isinstance(against, list))


def _check_targets(targets: list[Any]) -> list[Any]:
    """Bound the size of contrasts, which `models.resolve` checks later."""
    if count_against(targets) > MAX_AGAINST:
        raise ValueError(f"Contrasts have at most {MAX_AGAINST} classes together.")
    return targets


def _check_labels(labels: list[str]) -> list[str]:
    """Refuse labels that are blank or appear twice."""
    for place, label in enumerate(labels):
        if not label.strip():
            raise ValueError(f"Label {place} is blank.")
    if len(set(labels)) < len(labels):
        raise ValueError("A label appears twice.")
    return labels


Name = Annotated[str, Field(min_length=1, max_length=_MAX_NAME)]
Labels = Annotated[
    list[Name],
    Field(
        max_length=MAX_LABELS,
        description="Texts that are the classes, of a model of the task `zero_shot`; its own if "
        "there are none.",
        examples=[["a photo of a cat", "a photo of a dog"]],
    ),
    AfterValidator(_check_labels),
]
TargetOption = Annotated[Any, WithJsonSchema(_TARGET_SCHEMA)]
Targets = Annotated[
    list[TargetOption],
    Field(min_length=1, max_length=MAX_TARGETS, examples=[["top1", 281]]),
    AfterValidator(_check_targets),
]
Layers = Annotated[list[Name], Field(min_length=1, max_length=64, examples=[["auto"]])]
TopK = Annotated[int, Field(ge=1, le=100, description="Number of predictions.")]
MethodOption = Annotated[Name, WithJsonSchema({"type": "string", "enum": list(METHODS)})]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _check_clip(value: object) -> ClipChoice:
    """Read a share, or `auto`: a union of both would answer with two errors."""
    if value == "auto":
        return "auto"
    try:
        share = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        share = math.nan
    if not 0 <= share <= MAX_CLIP:
        raise ValueError(f"Must be auto, or a number from 0 to {MAX_CLIP}.")
    return share


_CLIP_SCHEMA: dict[str, Any] = {
    "anyOf": [{"const": "auto"}, {"type": "number", "minimum": 0, "maximum": MAX_CLIP}]
}
ClipOption = Annotated[Any, AfterValidator(_check_clip), WithJsonSchema(_CLIP_SCHEMA)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class InterventionOption(_Model):
    """Channels of a layer's output that are changed during the pass."""

    layer: Annotated[Name, Field(description="Dotted module name.", examples=["layer4.1"])]
    channels: Annotated[
        tuple[Annotated[int, Field(ge=0, le=1_000_000)], ...],
        # Otherwise each wrong one of thousands is described.
        FailFast(),
        Field(min_length=1, max_length=4096, examples=[[3, 17]]),
    ]
    op: Annotated[InterventionOp, Field(description="The operation on these channels.")]
    value: Annotated[
        Finite, Field(ge=-MAX_SCALE, le=MAX_SCALE, description="Factor of `scale`.")
    ] = 1.0


class CommonOptions(_Model):
    """Options of every operation."""

    operation: ClassVar[Operation]

    model: Annotated[
        Name | None,
        Field(description="Name, or `name@version`; the configured default if absent."),
    ] = None
    interventions: Annotated[
        list[InterventionOption],
        Field(max_length=16, description="Feature maps to change during the pass."),
    ] = []
    timeout_s: Annotated[
        Finite | None,
        Field(gt=0, description="Deadline in seconds; also the header `X-Request-Timeout-Ms`."),
    ] = None


class PredictOptions(CommonOptions):
    """Options of `/v1/predict`."""

    operation: ClassVar[Operation] = "predict"

    labels: Labels = []
    top_k: TopK = 5
    statistics: Annotated[
        bool, Field(description="Whether to add statistics of the model's recommended layer.")
    ] = False


class MapOptions(CommonOptions):
    """Options of operations that draw maps."""

    methods: Annotated[
        list[MethodOption],
        Field(min_length=1, max_length=len(METHODS), description="See `/v1/methods`."),
    ] = ["gradcam"]
    layers: Annotated[
        Layers,
        Field(description="Dotted module names or globs; `auto` is the recommended layer."),
    ] = ["auto"]
    fuse: Annotated[
        Fuse, Field(description="How the maps of several layers are fused into one.")
    ] = "none"
    outputs: Annotated[
        list[Output],
        Field(
            min_length=1,
            max_length=3,
            description="`heatmap` is a picture to lay over the image, `overlay` both blended, "
            "`values` the map itself.",
        ),
    ] = ["heatmap", "overlay"]
    canvas: Annotated[
        CanvasName, Field(description="`input` is the model's crop, `original` the whole image.")
    ] = "input"
    colormap: Annotated[
        ColormapChoice, Field(description="`auto`: turbo; coolwarm for signed maps.")
    ] = "auto"
    clip: Annotated[
        ClipOption,
        Field(
            description="Share of the strongest values that a picture may saturate; `auto`: 0 for "
            "maps of layers, 0.01 for maps of single pixels. Values are never clipped.",
        ),
    ] = "auto"
    alpha: Annotated[Finite, Field(ge=0, le=1, description="Opacity of the overlay.")] = 0.5
    overlay_format: Annotated[OverlayFormat, Field(description="Format of the overlay.")] = "jpeg"
    samples: Annotated[
        int | None, Field(ge=1, le=10_000, description="Samples of a stochastic method.")
    ] = None
    steps: Annotated[int | None, Field(ge=1, le=1_000, description="Steps of a path method.")] = (
        None
    )
    seed: Annotated[
        int | None, Field(ge=0, le=2**31 - 1, description="The same seed gives the same map.")
    ] = None


class ExplainOptions(MapOptions):
    """Options of `/v1/explain`."""

    operation: ClassVar[Operation] = "explain"

    labels: Labels = []
    top_k: TopK = 5
    targets: Annotated[Targets, Field(description="Classes to explain.")] = ["top1"]
    statistics: Annotated[
        bool, Field(description="Whether to add statistics of the explained layers.")
    ] = True
    faithfulness: Annotated[
        list[Measure], Field(max_length=5, description="Measures, each also of a random map.")
    ] = []
    curves: Annotated[
        bool, Field(description="Whether measures show the curves that they are made from.")
    ] = False
    partial_maps: Annotated[
        bool,
        Field(
            description="Whether a stream of events shows maps that take shape step by step; see "
            "`text/event-stream`."
        ),
    ] = False


class CompareOptions(MapOptions):
    """Options of `/v1/compare`."""

    operation: ClassVar[Operation] = "compare"


class FeaturesOptions(CommonOptions):
    """Options of `/v1/features`."""

    operation: ClassVar[Operation] = "features"

    labels: Labels = []
    targets: Annotated[Targets, Field(description="Classes whose scores are differentiated.")] = [
        "top1"
    ]
    layers: Annotated[
        Layers,
        Field(description="Dotted module names or globs; `auto` spreads over the depth."),
    ] = ["auto"]
    kinds: Annotated[
        list[Kind], Field(min_length=1, max_length=4, description="Tensors of each layer.")
    ] = ["output"]
    channels: Annotated[int, Field(ge=1, le=4096, description="Top channels to list.")] = 16
    grid: Annotated[bool, Field(description="Whether to return them as one image.")] = False
    colormap: Annotated[
        ColormapChoice, Field(description="Colours of the grid; `auto`: turbo.")
    ] = "auto"


class ImageOption(_Model):
    """One image of a JSON request."""

    b64: Annotated[
        str | None, Field(description="Base64 of the encoded image, or a `data:` URL.")
    ] = None
    url: Annotated[
        Annotated[str, Field(max_length=4096)] | None,
        Field(description="URL of the image; only if the operator allows it."),
    ] = None
    targets: Annotated[Targets | None, Field(description="Override the common targets.")] = None


AnyOptions = PredictOptions | ExplainOptions | FeaturesOptions | CompareOptions


@lru_cache
def list_options(model: type[BaseModel]) -> frozenset[str]:
    """Names of list options, which a query may give comma-separated or repeated."""
    found = properties(model).items()
    return frozenset(name for name, schema in found if schema.get("type") == "array")


def properties(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """JSON schema of each option."""
    schema: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    return schema
