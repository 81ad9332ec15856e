"""What the configuration says about a model, before anything is loaded. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import structs
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.types import Precision, Preprocess, Task

DEFAULT_MODEL = "efficientnet_lite0"

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Triple = tuple[float, float, float]
Runtime = Literal["torch", "openvino"]


class PreprocessSpec(BaseModel):
    """Overrides of the preprocessing that the weights bring with them; None keeps theirs."""

    model_config = ConfigDict(extra="forbid")

    resize: Annotated[int, Field(ge=8, le=4096)] | None = None
    crop: Annotated[int, Field(ge=8, le=4096)] | None = None
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    std: Triple | None = None

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _is_of_three_channels(cls, values: object) -> object:
        if isinstance(values, (list, tuple)) and len(values) != 3:
            raise ValueError(
                "There are three values, for red, green and blue; images are served in RGB, and "
                "for grey ones the same value is given three times."
            )
        return values

    def over(self, base: Preprocess) -> Preprocess:
        """Return `base` with every field that is set here put in its place; a crop is square."""
        return structs.replace(
            base,
            resize=base.resize if self.resize is None else self.resize,
            crop=base.crop if self.crop is None else (self.crop, self.crop),
            interpolation=self.interpolation or base.interpolation,
            mean=self.mean or base.mean,
            std=self.std or base.std,
        )


class ModelSpec(BaseModel):
    """One `[[models]]` entry.

    Attributes:
        name: name in URLs and options.
        version: any short string without `@` or `/`.
        source: `torchvision:NAME`, `timm:NAME`, `python:package.module:factory`, `embedded:NAME`.
        weights: `default` (the library's), `none` (random), or a checkpoint file.
        weights_key: dotted place of the weights in that file; None takes the one that fits.
        labels: class names, or a file with one per line (or a JSON list); None takes the library's.
        num_classes: size of the head; None keeps the architecture's own.
        task: how scores become probabilities.
        target_layer: dotted module name, or `auto`.
        precision: what the model computes in, if that passes a check of its scores.
        runtime: what runs the part up to the target layer on a CPU, if the model's head allows it.
        cuda_graphs: whether CUDA devices replay recorded passes.
        copy_stream: whether images reach CUDA devices on a stream of their own.
        devices: devices that hold the model; None = all of the service's.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "1"
    source: Annotated[str, Field(pattern=r"^(torchvision|timm|python|embedded):.+$")]
    weights: str = "default"
    weights_key: str | None = None
    labels: list[str] | Path | None = None
    num_classes: Annotated[int, Field(ge=1)] | None = None
    task: Task = "single_label"
    target_layer: str = "auto"
    precision: Precision = "fp32"
    runtime: Runtime = "torch"
    cuda_graphs: bool = False
    copy_stream: bool = False
    devices: list[str] | None = None
    preprocess: PreprocessSpec = PreprocessSpec()

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
