"""What the Open Inference Protocol sends and receives, field by field."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from models.types import Struct

Parameters = dict[str, str | bool | int | float]

Datatype = Annotated[str, Meta(examples=["FP32", "BYTES", "UINT8"])]
Shape = Annotated[tuple[int, ...], Meta(description="Sizes; -1 where they vary.")]

# ---------------------------------------------------------------- inference


class InferInput(Struct):
    """An input tensor; its data is here, or in the binary part of the body."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: Parameters = {}
    data: Any = UNSET


class RequestedOutput(Struct):
    """An output that is asked for."""

    name: str
    parameters: Parameters = {}


class InferRequest(Struct, kw_only=True):
    """An inference request; unknown keys are left alone."""

    id: str | int | None = None
    inputs: list[InferInput]
    outputs: list[RequestedOutput] | None = None
    parameters: Parameters = {}


class InferOutput(Struct):
    """An output tensor; its data is here, or in the binary part of the body."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    parameters: Parameters | UnsetType = UNSET
    data: list[Any] | UnsetType = UNSET


class InferResponse(Struct, kw_only=True):
    """The requested outputs in the requested order."""

    model_name: str
    model_version: str
    id: str | int | UnsetType = UNSET
    outputs: tuple[InferOutput, ...]


# ---------------------------------------------------------------- server and models


class ServerMetadata(Struct):
    """The server, and the extensions of the protocol that it offers."""

    name: str
    version: str
    extensions: tuple[str, ...]


class ServerHealth(Struct):
    """Liveness and readiness; `error` says what is missing."""

    live: bool
    ready: bool
    error: str | UnsetType = UNSET


class ModelHealth(Struct):
    """The readiness of a model; `error` says what is missing."""

    name: str
    ready: bool
    error: str | UnsetType = UNSET


class ModelNames(Struct):
    """The names of all models."""

    models: tuple[str, ...]


class TensorMetadata(Struct):
    """An input or output of a model."""

    name: str
    datatype: Datatype
    shape: Shape


class ModelMetadata(Struct):
    """A model's inputs and outputs."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class TensorConfig(Struct):
    """An input or output in a model's configuration; `dims` leave out the batch."""

    name: str
    data_type: Annotated[str, Meta(examples=["TYPE_FP32", "TYPE_STRING"])]
    dims: Shape


class DynamicBatching(Struct):
    """How requests are batched."""

    preferred_batch_size: tuple[int, ...]
    max_queue_delay_microseconds: int


class ModelConfig(Struct):
    """A model's configuration in Triton's terms."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: tuple[TensorConfig, ...]
    output: tuple[TensorConfig, ...]
    dynamic_batching: DynamicBatching


# ---------------------------------------------------------------- statistics


class StatisticDuration(Struct):
    """How often something was done, and how long it took in all."""

    count: int = 0
    ns: int = 0


class InferStatistics(Struct):
    """Requests by how they ended, and the stages of their images."""

    success: StatisticDuration
    fail: StatisticDuration
    queue: StatisticDuration
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration
    cache_hit: StatisticDuration = StatisticDuration()
    cache_miss: StatisticDuration = StatisticDuration()


class ModelStatistics(Struct):
    """The statistics of one model version.

    Attributes:
        last_inference: milliseconds since the epoch; 0 = never.
        inference_count: images that were answered.
        execution_count: batches that were run.
    """

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferStatistics
    batch_stats: tuple[StatisticDuration, ...] = ()


class ModelStatisticsList(Struct):
    """The statistics of model versions."""

    model_stats: tuple[ModelStatistics, ...]


REQUESTS = (InferRequest,)
RESPONSES = (
    InferResponse,
    ModelConfig,
    ModelHealth,
    ModelMetadata,
    ModelNames,
    ModelStatisticsList,
    ServerHealth,
    ServerMetadata,
)
"""What the OpenAPI document describes."""
