"""What the configuration says about a model, before anything is loaded. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

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
        weights: `default` (the library's), `none` (random), or a .safetensors, .pth or .pt file.
        labels: class names, or a file with one per line (or a JSON list); None takes the library's.
        num_classes: size of the head; None keeps the architecture's own.
        task: how scores become probabilities.
        target_layer: dotted module name, or `auto`.
        precision: what the model computes in, if that passes a check of its scores.
        runtime: what runs the part up to the target layer on a CPU, if the model's head allows it.
        compile: whether to compile that part with `torch.compile`; starts then take minutes.
        cuda_graphs: whether CUDA devices replay recorded passes; other devices do not ask.
        devices: devices that hold the model; None = all of the service's.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "1"
    source: Annotated[str, Field(pattern=r"^(torchvision|timm|python|embedded):.+$")]
    weights: str = "default"
    labels: list[str] | Path | None = None
    num_classes: Annotated[int, Field(ge=1)] | None = None
    task: Task = "single_label"
    target_layer: str = "auto"
    precision: Precision = "fp32"
    runtime: Runtime = "torch"
    compile: bool = False
    cuda_graphs: bool = True
    devices: list[str] | None = None
    preprocess: PreprocessSpec = PreprocessSpec()

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_text(cls, version: object) -> object:
        return str(version) if isinstance(version, int) else version

    @model_validator(mode="after")
    def _compile_is_torch(self) -> Self:
        if self.compile and self.runtime != "torch":
            raise ValueError("compile = true is for the runtime torch.")
        return self


def default_spec() -> ModelSpec:
    """The embedded default model: EfficientNet-Lite0 with ImageNet weights from a package."""
    return ModelSpec(name=DEFAULT_MODEL, source=f"embedded:{DEFAULT_MODEL}")
