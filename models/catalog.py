"""What the configuration says about a model, before anything is loaded. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import structs
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.errors import ModelLoadFailed
from models.types import Fit, ModelKey, Order, Precision, Preprocess, Task

DEFAULT_MODEL = "efficientnet_lite0"

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Mode = Literal["crop", "squash", "letterbox", "none"]
Side = Annotated[int, Field(ge=8, le=4096)]
Sides = Side | tuple[Side, Side]
Values = Annotated[tuple[float, ...], Field(min_length=1, max_length=64)]
Deviations = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=64)
]
Runtime = Literal["auto", "torch", "openvino"]

_FITS: Mapping[Mode, Fit] = {"squash": "stretch", "letterbox": "contain", "none": "none"}


class PreprocessSpec(BaseModel):
    """Overrides of the preprocessing that the weights bring with them; None keeps theirs.

    Attributes:
        mode: how an image comes to the input's size: `crop` resizes it and takes the middle,
            `squash` ignores its aspect ratio, `letterbox` pads it, `none` does not resize it.
        resize: short side after resizing, or (height, width).
        crop: the size of the network's input: one side, or (height, width).
        interpolation: the filter of the resize.
        padding: grey level around a letterboxed image; None = the mean colour.
        channels: that the network takes.
        order: of the three colours, as the network takes them.
        bits: 16 keeps all bits of deeper samples.
        range: what black and white become, before `mean` and `std` apply; [0, 1] unless given.
        mean, std: of each channel as the network has them, or one value for all.
    """

    model_config = ConfigDict(extra="forbid")

    mode: Mode | None = None
    resize: Sides | None = None
    crop: Sides | None = None
    interpolation: Interpolation | None = None
    padding: Annotated[int, Field(ge=0, le=255)] | None = None
    channels: Annotated[int, Field(ge=1, le=64)] | None = None
    order: Order | None = None
    bits: Literal[8, 16] | None = None
    range: tuple[float, float] | None = None
    mean: Values | None = None
    std: Deviations | None = None

    def over(self, base: Preprocess) -> Preprocess:
        """Return `base` with every field that is set here put in its place.

        Raises:
            ModelLoadFailed: the fields contradict each other, or those of `base`.
        """
        merged = structs.replace(
            base,
            interpolation=self.interpolation or base.interpolation,
            padding=base.padding if self.padding is None else self.padding,
            channels=self.channels or base.channels,
            order=self.order or base.order,
            bits=self.bits or base.bits,
        )
        if merged.order == "bgr" and merged.channels != 3:
            raise ModelLoadFailed("preprocess.order applies to three channels only.")
        return self._normalised(self._sized(merged))

    def _sized(self, base: Preprocess) -> Preprocess:
        mode = self.mode or ("squash" if isinstance(self.resize, tuple) else None)
        if mode is None and self.resize is None and self.crop is None:
            return base
        fit = _FITS.get(mode) if mode else None
        resize: int | tuple[int, int]
        if fit is None:
            crop = _pair(self.crop) or base.crop
            resize, fit = self._with_margin(base, crop)
        else:
            resize = _pair(self.resize) or _pair(self.crop) or base.crop
            crop = _pair(self.crop) or resize
        sized = structs.replace(base, resize=resize, crop=crop, fit=fit)
        short = _pair(resize)
        if fit in ("stretch", "cover") and short and (short[0] < crop[0] or short[1] < crop[1]):
            # Otherwise images would be padded with black, which is surely not wanted.
            raise ModelLoadFailed(
                f"preprocess.crop {_text(crop)} is larger than preprocess.resize {_text(short)}."
            )
        return sized

    def _with_margin(
        self, base: Preprocess, crop: tuple[int, int]
    ) -> tuple[int | tuple[int, int], Fit]:
        """What to resize to before a crop: as configured, or with the margin that `base` has."""
        square = crop[0] == crop[1] and isinstance(base.resize, int)
        if self.resize is not None:
            return self.resize, "cover" if isinstance(self.resize, tuple) else base.fit
        if square and isinstance(base.resize, int):
            return round(base.resize * crop[0] / base.crop[0]), base.fit
        height, width = _pair(base.resize) or base.crop
        scaled = round(height * crop[0] / base.crop[0]), round(width * crop[1] / base.crop[1])
        own = self.mode is None and not isinstance(base.resize, int)
        return scaled, base.fit if own else "cover"

    def _normalised(self, base: Preprocess) -> Preprocess:
        low, high = self.range or (0.0, 1.0)
        if high <= low:
            raise ModelLoadFailed("preprocess.range is [value of black, value of white].")
        keep = self.range is None and len(base.mean) == base.channels
        mean = self._of_channels("mean", base.mean if keep else (0.0,), base.channels)
        std = self._of_channels("std", base.std if keep else (1.0,), base.channels)
        return structs.replace(
            base,
            mean=tuple((value - low) / (high - low) for value in mean),
            std=tuple(value / (high - low) for value in std),
        )

    def _of_channels(
        self, name: Literal["mean", "std"], default: tuple[float, ...], channels: int
    ) -> tuple[float, ...]:
        values: tuple[float, ...] = getattr(self, name) or default
        if len(values) not in (1, channels):
            raise ModelLoadFailed(
                f"preprocess.{name} has {len(values)} values, but the network takes {channels} "
                f"channel{'s' if channels > 1 else ''}. Give one value for each, or one for all; "
                "preprocess.channels says how many the network takes."
            )
        return values * channels if len(values) == 1 else values


def _pair(sides: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (sides, sides) if isinstance(sides, int) else sides


def _text(sides: tuple[int, int]) -> str:
    return f"{sides[0]}" if sides[0] == sides[1] else f"{sides[0]} x {sides[1]}"


class ModelSpec(BaseModel):
    """One `[[models]]` entry.

    Attributes:
        name: name in URLs and options.
        version: any short string without `@` or `/`.
        source: `torchvision:NAME`, `timm:NAME` or `timm:FOLDER`, `transformers:FOLDER`,
            `export:FILE`, `onnx:FILE`, `checkpoint:FILE`, `python:module:factory` or `python:FILE:factory`, or
            `embedded:NAME`.
        weights: `default` (the library's), `none` (random), or a checkpoint file.
        weights_sha256: digest that the weights file must have; None takes any.
        weights_key: dotted place of the weights in that file; None takes the one that fits.
        labels: class names, or a file with one per line (or a JSON list); None takes the library's.
            Of the task `zero_shot` they are texts, which the network scores.
        num_classes: size of the head; None keeps the architecture's own.
        task: what the network does: `single_label`, `multi_label`, `binary`, `segmentation`,
            `embedding` or `zero_shot`; None takes what the source says, or single_label.
        output: key, attribute or index of the scores, where the network returns several tensors.
        inputs: constant values of the network's inputs other than the image, by parameter of `forward`.
        target_layer: dotted module name, or `auto`.
        precision: what the model computes in, if that passes a check of its scores.
        runtime: what runs the part up to the target layer on a CPU, if the model's head allows it;
            `auto` takes OpenVINO where it is installed, gives the same and is clearly faster.
        cuda_graphs: whether CUDA devices replay recorded passes.
        copy_stream: whether images reach CUDA devices on a stream of their own.
        devices: devices that hold the model; None = all of the service's.
        preprocess: what differs from the preprocessing that comes with the weights.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "1"
    source: Annotated[
        str,
        Field(
            pattern=r"^(torchvision|timm|python|transformers|export|onnx|checkpoint|embedded):.+$"
        ),
    ]
    weights: str = "default"
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    weights_key: str | None = None
    labels: list[str] | Path | None = None
    num_classes: Annotated[int, Field(ge=1)] | None = None
    task: Task | None = None
    output: int | str | None = None
    inputs: dict[str, Any] = {}
    target_layer: str = "auto"
    precision: Precision = "fp32"
    runtime: Runtime = "auto"
    cuda_graphs: bool = False
    copy_stream: bool = False
    devices: list[str] | None = None
    preprocess: PreprocessSpec = PreprocessSpec()

    @property
    def key(self) -> ModelKey:
        """Name and version."""
        return self.name, self.version

    @property
    def full_name(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_text(cls, version: object) -> object:
        return str(version) if isinstance(version, int) else version

    @model_validator(mode="before")
    @classmethod
    def _compile_was_removed(cls, fields: object) -> object:
        if isinstance(fields, Mapping) and "compile" in fields:
            raise ValueError(
                "The key compile was removed: torch.compile was slower than the fused network in "
                "every measurement, and took minutes at each start. Delete it."
            )
        return fields


def default_spec() -> ModelSpec:
    """The embedded default model: EfficientNet-Lite0 with ImageNet weights from a package."""
    return ModelSpec(name=DEFAULT_MODEL, source=f"embedded:{DEFAULT_MODEL}")
