"""The settings of the service, by the sections of its configuration file.

`service.configuration` reads them from the file and the environment.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import NoDecode

from models.catalog import ModelSpec, default_spec
from service.hardware import available_cores

LogLevel = Literal["debug", "info", "warning", "error"]


def _split(value: object) -> object:
    """Turn `a,b`, or the JSON of a list, into a list; other values stay as they are."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            raise ValueError("A list is JSON, or items separated by commas.") from None
    return [item.strip() for item in value.split(",") if item.strip()]


def _hash_key(value: object) -> object:
    if not isinstance(value, str) or not value:
        raise ValueError("A key is text.")
    if not value.startswith("sha256:"):
        return "sha256:" + hashlib.sha256(value.encode()).hexdigest()
    if not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", value):
        raise ValueError("A hashed key is `sha256:` and 64 hexadecimal digits.")
    return value.lower()


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|(cpu|cuda)(:[0-9]{1,3})?", name):
        raise ValueError("allowed are auto, cpu, cpu:N, cuda and cuda:N")
    return name


T = TypeVar("T")
CommaList = Annotated[list[T], NoDecode, BeforeValidator(_split)]
Names = CommaList[str]
Devices = Annotated[CommaList[Annotated[str, AfterValidator(_known_device)]], Field(min_length=1)]
KeyHashes = CommaList[Annotated[str, BeforeValidator(_hash_key)]]
Route = Annotated[str, Field(pattern=r"^/")]
Models = Annotated[CommaList[ModelSpec], Field(validate_default=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ServerSettings(_Section):
    """`[server]`.

    Attributes:
        host: address to bind.
        port: port to bind; 0 takes a free one.
        log_level: `debug`, `info`, `warning` or `error`.
        http_workers: HTTP processes; `auto` takes one per four cores, at most 8.
        devices: `auto`, `cpu`, `cpu:0`, `cuda:0`, …; `auto` takes the best found.
        grace_s: time that accepted requests get to finish after SIGTERM.
        ready_within_s: maximum age of the last completed pass of a healthy device.
        grpc_port: port of the Open Inference Protocol over gRPC; None = off. Needs the extra `grpc`.
        aliases: other paths of routes, such as those that a platform dictates: `{"/ask":
            "/v1/models/defects:explain"}`.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    http_workers: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    devices: Devices = ["auto"]
    log_level: LogLevel = "info"
    grace_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    ready_within_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    grpc_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    aliases: dict[Route, Route] = {}

    def http_worker_count(self) -> int:
        """Number of HTTP processes to start."""
        if self.http_workers == "auto":
            return max(1, min(8, available_cores() // 4))
        return self.http_workers


class LimitSettings(_Section):
    """`[limits]`: limits of one request.

    Attributes:
        max_body_mb: whole request body, in millions of bytes.
        max_image_mb: one encoded image.
        max_options_kb: options in a multipart part, in thousands of bytes.
        max_pixels: width times height of one image.
        max_images: images in one request.
        max_request_pixels: width times height of all images of one request.
        max_decode_s: processor time for decoding one image.
        max_decode_mb: memory for decoding one image, in millions of bytes.
        decoders: processes that decode images in formats and of sizes that are not proved to be cheap,
            in each HTTP process.
        max_results: explanations, or statistics of layers, in one response.
        max_device_s: estimated device time of one request, all images together.
        max_answer_mb: estimated size of one answer, in millions of bytes.
        max_wait_s: estimated wait beyond which a request is refused.
        timeout_s: deadline of a request without one.
        max_timeout_s: longest deadline; longer ones are cut.
        max_concurrent_per_key: image requests in flight of one key, in all HTTP processes together;
            None = unlimited.
    """

    max_body_mb: Annotated[float, Field(gt=0, le=2000)] = 20.0
    max_image_mb: Annotated[float, Field(gt=0, le=2000)] = 10.0
    max_options_kb: Annotated[float, Field(gt=0, le=2000)] = 64.0
    max_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = 50_000_000
    max_images: Annotated[int, Field(ge=1, le=1024)] = 32
    max_request_pixels: Annotated[int, Field(ge=1)] = 400_000_000
    max_decode_s: Annotated[float, Field(gt=0, le=3600)] = 4.0
    max_decode_mb: Annotated[int, Field(ge=100)] = 1000
    decoders: Annotated[int, Field(ge=1, le=256)] = 2
    max_results: Annotated[int, Field(ge=1, le=1_000_000)] = 2048
    max_device_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    max_answer_mb: Annotated[float, Field(gt=0, le=2000)] = 32.0
    max_wait_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    max_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    max_concurrent_per_key: Annotated[int, Field(ge=1)] | None = None

    @property
    def max_body_bytes(self) -> int:
        """Whole request body in bytes."""
        return int(self.max_body_mb * 1_000_000)

    @property
    def max_image_bytes(self) -> int:
        """One encoded image in bytes."""
        return int(self.max_image_mb * 1_000_000)

    @property
    def max_answer_bytes(self) -> int:
        """Estimated size of one answer in bytes."""
        return int(self.max_answer_mb * 1_000_000)

    @property
    def max_options_bytes(self) -> int:
        """Options of a multipart request in bytes."""
        return int(self.max_options_kb * 1_000)


class ConnectionSettings(_Section):
    """`[connections]`: limits of HTTP connections, in each HTTP process.

    Attributes:
        max_connections: in all. For one more, the one that has waited longest without a request is
            ended. A service that may open few files has fewer.
        max_per_address: of one client address (of one /64 network of IPv6). Behind a proxy all have
            its address.
        max_headers: of one request.
        max_header_kb: request line and headers of one request, in thousands of bytes.
        max_buffered_mb: bodies of all requests in progress, in millions of bytes.
        header_timeout_s: time in which a request's headers have to arrive.
        idle_timeout_s: time that a connection is kept for the next request.
        min_bytes_per_s: least rate at which a body arrives and a response is read.
        stall_timeout_s: time for which that rate may be missed.
    """

    max_connections: Annotated[int, Field(ge=1)] = 2048
    max_per_address: Annotated[int, Field(ge=1)] = 512
    max_headers: Annotated[int, Field(ge=1)] = 100
    max_header_kb: Annotated[float, Field(ge=1, le=1000)] = 64.0
    max_buffered_mb: Annotated[float, Field(gt=0)] = 128.0
    header_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    idle_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    min_bytes_per_s: Annotated[int, Field(ge=1)] = 1000
    stall_timeout_s: Annotated[float, Field(gt=0)] = 10.0

    @property
    def max_header_bytes(self) -> int:
        """Request line and headers in bytes."""
        return int(self.max_header_kb * 1_000)

    @property
    def max_buffered_bytes(self) -> int:
        """Bodies of all requests in progress, in bytes."""
        return int(self.max_buffered_mb * 1_000_000)


class SecuritySettings(_Section):
    """`[security]`.

    Attributes:
        api_keys: keys for `/v1`, as `sha256:<hex>`; plain ones are hashed at once. Without keys the
            API is open to all.
        admin_keys: keys for everything; without them the admin API is off.
        require_keys: whether the service refuses to start without API keys.
        operations: who may read `/docs`, `/openapi.json`, `/metrics` and the details of `/readyz`:
            anyone (`open`), or callers with a key (`key`).
        allowed_url_hosts: hosts (`example.org`, `*.example.org`) allowed in image URLs; without
            them URLs are refused.
        allow_http_urls: whether image URLs may be plain `http`.
        cors_origins: origins of web pages that may call the API.
    """

    api_keys: KeyHashes = []
    admin_keys: KeyHashes = []
    require_keys: bool = False
    operations: Literal["open", "key"] = "open"
    allowed_url_hosts: Names = []
    allow_http_urls: bool = False
    cors_origins: Names = []

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.require_keys and not self.api_keys:
            raise ValueError("api_keys are required, but none are configured.")
        return self


class WorkerSettings(_Section):
    """`[workers]`: the device workers and their supervision.

    Attributes:
        threads: torch threads of a CPU worker; None shares the cores among the CPU devices.
        restarts: restarts of one process within `restart_window_s` before the service gives up.
        restart_window_s: the window of that budget.
        hang_floor_s: minimum age of a running batch that counts as a hang.
        hang_factor: multiple of its predicted duration after which a batch counts as a hang.
        quarantine_s: time for which a job that was in two exits of workers is refused.
        canary_s: idle time after which a device runs a pass to prove that it works.
        keep_heap: whether CPU workers keep freed memory for the next pass (glibc only); faster, but
            a little larger.
    """

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    restarts: Annotated[int, Field(ge=0)] = 5
    restart_window_s: Annotated[float, Field(gt=0)] = 60.0
    hang_floor_s: Annotated[float, Field(gt=0)] = 10.0
    hang_factor: Annotated[float, Field(gt=1)] = 10.0
    quarantine_s: Annotated[float, Field(ge=0)] = 600.0
    canary_s: Annotated[float, Field(gt=0)] = 5.0
    keep_heap: bool = True


class TracingSettings(_Section):
    """`[tracing]`: OpenTelemetry; needs the extra `otel`.

    Attributes:
        enabled: None = if an `endpoint` is set, here or in OpenTelemetry's own variables.
        endpoint: base URL of an OTLP/HTTP collector, such as `http://127.0.0.1:4318`; None = that
            of OpenTelemetry's own variables.
    """

    enabled: bool | None = None
    endpoint: Annotated[str, Field(pattern=r"^https?://.+")] | None = None


class Settings(_Section):
    """All settings, valid and complete; `load_settings` reads them for the service.

    They depend on neither environment nor file, so that they can be sent to other processes as JSON
    (`model_dump_json`, `model_validate_json`).

    Attributes:
        models: the catalog; the embedded default model unless configured.
        default_model: name of the model for requests without one; the first one unless configured.
        base_dir: folder against which relative paths of the catalog are resolved.
    """

    server: ServerSettings = ServerSettings()
    limits: LimitSettings = LimitSettings()
    connections: ConnectionSettings = ConnectionSettings()
    security: SecuritySettings = SecuritySettings()
    workers: WorkerSettings = WorkerSettings()
    tracing: TracingSettings = TracingSettings()
    models: Models = []
    default_model: Annotated[str, Field(validate_default=True)] = ""
    base_dir: Path = Field(default_factory=Path.cwd)

    @field_validator("models")
    @classmethod
    def _check_models(cls, models: list[ModelSpec]) -> list[ModelSpec]:
        names = [spec.full_name for spec in models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Model {name} is configured twice.")
        return models or [default_spec()]

    @field_validator("default_model")
    @classmethod
    def _check_default_model(cls, name: str, info: ValidationInfo) -> str:
        names = list(dict.fromkeys(spec.name for spec in info.data.get("models", [])))
        if names and name and name not in names:
            raise ValueError(f"must be one of: {', '.join(names)}.")
        return name or next(iter(names), "")
