"""What the operator configures: a TOML file and `HEATLENS_*` variables, checked once at the start.

Sources, the first one wins: arguments of `load_settings`, environment, file, defaults. Nested keys
are written with `__` in the environment (`HEATLENS_LIMITS__MAX_IMAGES=8`), lists as JSON or
separated by commas. Of other variables only `HEATLENS_DEFAULT_MODEL` and `HEATLENS_MODELS` are
read: orchestrators set some, such as `HEATLENS_PORT`, by themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from models.catalog import ModelSpec, default_spec
from service.hardware import available_cores

ENV_PREFIX = "HEATLENS_"
ENV_DELIMITER = "__"

LogLevel = Literal["debug", "info", "warning", "error"]


class ConfigurationError(ValueError):
    """The configuration is wrong; the text names the key and never repeats a secret."""


def _split(value: object) -> object:
    """Let `a,b` stand for a list where the environment or a flag gives text."""
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


Names = Annotated[list[str], BeforeValidator(_split)]


def _known_devices(names: list[str]) -> list[str]:
    for name in names:
        if not re.fullmatch(r"auto|(cpu|cuda)(:[0-9]{1,3})?", name):
            raise ValueError("allowed are auto, cpu, cpu:N, cuda and cuda:N")
    return names


Devices = Annotated[Names, AfterValidator(_known_devices), Field(min_length=1)]
KeyHash = Annotated[str, BeforeValidator(_hash_key)]
KeyHashes = Annotated[list[KeyHash], BeforeValidator(_split)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ServerSettings(_Section):
    """`[server]`.

    Attributes:
        http_workers: HTTP processes; `auto` takes one per four cores, at most 8.
        devices: `auto`, `cpu`, `cpu:0`, `cuda:0`, …; `auto` takes the best found.
        grace_s: time that accepted requests get to finish after SIGTERM.
        ready_within_s: age up to which a device's last completed pass counts as proof of its
            health.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    http_workers: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    devices: Devices = ["auto"]
    log_level: LogLevel = "info"
    grace_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    ready_within_s: Annotated[float, Field(gt=0, le=3600)] = 30.0

    def http_worker_count(self) -> int:
        """Number of HTTP processes to start."""
        if self.http_workers == "auto":
            return max(1, min(8, available_cores() // 4))
        return self.http_workers


class LimitSettings(_Section):
    """`[limits]`: what one request may cost.

    Attributes:
        max_body_mb: whole request body, in millions of bytes.
        max_image_mb: one encoded image.
        max_options_kb: options in a multipart part, in thousands of bytes.
        max_pixels: width times height of one image.
        max_images: images in one request.
        max_results: explanations, or statistics of layers, in one answer.
        max_wait_s: estimated wait for a device beyond which a request is refused.
        timeout_s: deadline of a request that names none.
        max_timeout_s: longest deadline that a request may name; longer ones are cut.
        max_concurrent_per_key: requests for images that one key may have under way, in all HTTP
            processes together; None = any number.
    """

    max_body_mb: Annotated[float, Field(gt=0, le=2000)] = 20.0
    max_image_mb: Annotated[float, Field(gt=0, le=2000)] = 10.0
    max_options_kb: Annotated[float, Field(gt=0, le=2000)] = 64.0
    max_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = 50_000_000
    max_images: Annotated[int, Field(ge=1, le=1024)] = 32
    max_results: Annotated[int, Field(ge=1, le=1_000_000)] = 2048
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
    def max_options_bytes(self) -> int:
        """Options of a multipart request in bytes."""
        return int(self.max_options_kb * 1_000)


class SecuritySettings(_Section):
    """`[security]`.

    Attributes:
        api_keys: keys that open `/v1`, as `sha256:<hex>`; plain ones are hashed at once. None =
            open to all.
        admin_keys: keys that open everything; none = the admin API is off.
        allowed_url_hosts: hosts (`example.org`, `*.example.org`) that image URLs may name; none =
            no URLs.
        cors_origins: origins of web pages that may call the API.
    """

    api_keys: KeyHashes = []
    admin_keys: KeyHashes = []
    allowed_url_hosts: Names = []
    cors_origins: Names = []


class WorkerSettings(_Section):
    """`[workers]`: how device workers are run and watched.

    Attributes:
        threads: torch threads of a CPU worker; None shares the cores among the CPU devices.
        restarts: restarts of one process within `restart_window_s` before the service gives up.
        restart_window_s: the window of that budget.
        hang_floor_s: shortest time after which a running batch is called a hang.
        hang_factor: times its predicted duration after which a running batch is called a hang.
        canary_s: pause after which an idle device proves itself by a real pass.
        keep_heap: whether CPU workers keep freed memory for the next pass (glibc only); faster, a
            little larger.
    """

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    restarts: Annotated[int, Field(ge=0)] = 5
    restart_window_s: Annotated[float, Field(gt=0)] = 60.0
    hang_floor_s: Annotated[float, Field(gt=0)] = 10.0
    hang_factor: Annotated[float, Field(gt=1)] = 10.0
    canary_s: Annotated[float, Field(gt=0)] = 5.0
    keep_heap: bool = True


class MetricsSettings(_Section):
    """`[metrics]`.

    Attributes:
        nv_aliases: whether `/metrics` also has the main names of Triton, `nv_inference_*`, for
            dashboards made for it.
    """

    nv_aliases: bool = False


class TracingSettings(_Section):
    """`[tracing]`: OpenTelemetry; needs the extra `otel`.

    Attributes:
        enabled: None = if there is an `endpoint`, here or in OpenTelemetry's own variables.
        endpoint: base address of an OTLP collector that speaks HTTP, such as
            `http://127.0.0.1:4318`; None leaves it to OpenTelemetry's own variables.
    """

    enabled: bool | None = None
    endpoint: Annotated[str, Field(pattern=r"^https?://.+")] | None = None


class Settings(_Section):
    """The whole configuration, valid and complete; `load_settings` makes it for the service.

    It reads neither environment nor file by itself, so that it can travel to other processes as
    JSON (`model_dump_json`, `model_validate_json`).

    Attributes:
        default_model: name of the model that answers requests naming none; the first one unless
            configured.
        models: the catalog; the embedded default model when none is configured.
        base_dir: folder against which relative paths of the catalog are meant.
    """

    default_model: str = ""
    server: ServerSettings = ServerSettings()
    limits: LimitSettings = LimitSettings()
    security: SecuritySettings = SecuritySettings()
    workers: WorkerSettings = WorkerSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    models: Annotated[list[ModelSpec], BeforeValidator(_split)] = []
    base_dir: Path = Field(default_factory=Path.cwd)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Put the embedded model into an empty catalog, and name the default model."""
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        filled["models"] = values.get("models") or [default_spec()]
        if isinstance(
            filled["models"], str
        ):  # the environment's JSON; nonsense is left to the field
            with suppress(ValueError):
                filled["models"] = _split(filled["models"])
        if not filled.get("default_model") and isinstance(filled["models"], list):
            filled["default_model"] = _name(filled["models"][0])
        return filled

    @model_validator(mode="after")
    def _agree(self) -> Self:
        seen = set()
        for spec in self.models:
            if (spec.name, spec.version) in seen:
                raise ValueError(f"Model {spec.name}@{spec.version} is configured twice.")
            seen.add((spec.name, spec.version))
        names = list(dict.fromkeys(spec.name for spec in self.models))
        if self.default_model not in names:
            raise ValueError(f"default_model must be one of: {', '.join(names)}.")
        return self


def _name(spec: object) -> object:
    return spec.get("name", "") if isinstance(spec, Mapping) else getattr(spec, "name", "")


def load_settings(
    config: Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read, merge and check the configuration.

    Args:
        config: a TOML file; None = none.
        overrides: nested values that win over everything, such as `{"server": {"port": 9000}}`.
        environ: variables to read instead of the process's own.

    Raises:
        ConfigurationError: a file that cannot be read, an unknown key or a wrong value; the text
            names it.
    """
    values: dict[str, Any] = {"base_dir": (config.parent if config else Path()).resolve()}
    values = _merge(values, _read_file(config) if config else {})
    values = _merge(values, _read_environment(os.environ if environ is None else environ))
    values = _merge(values, overrides or {})
    values["base_dir"] = _absolute(values["base_dir"], config)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_describe(error)) from None


def _read_file(config: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{config}: {error.strerror or 'cannot be read'}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{config} is not valid TOML: {error}") from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in environ.items():
        path = name.removeprefix(ENV_PREFIX).lower().split(ENV_DELIMITER)
        if not name.startswith(ENV_PREFIX):
            continue
        if len(path) == 1 and path[0] not in {"default_model", "models"}:
            continue
        if path[0] not in Settings.model_fields:
            raise ConfigurationError(f"{name}: there is no section {path[0]}.")
        nested: Any = value
        for key in reversed(path):
            nested = {key: nested}
        values = _merge(values, nested)
    return values


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        nested = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below or {}, value) if nested else value
    return merged


def _absolute(folder: Path | str, config: Path | None) -> Path:
    return ((config.parent if config else Path()) / folder).resolve()


def _describe(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        key = ".".join(map(str, item["loc"]))
        text = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
        text = text.removeprefix("Value error, ")
        lines.append(f"{key}: {text}" if key else text)
    return "; ".join(lines)


# ---------------------------------------------------------------- configuration


M = TypeVar("M", bound=BaseModel)

_FIXED_SERVER = ("host", "port", "http_workers", "devices")
_FIXED_LIMITS = ("max_wait_s",)
_FIXED = ("workers", "tracing", "base_dir")


class ConfigurationSource(BaseModel):
    """A file and what was said on the command line; the environment is read by whoever reads them.

    Attributes:
        path: the TOML file, absolute; None = none.
        overrides: nested values that win over file and environment.
    """

    model_config = ConfigDict(frozen=True)

    path: Path | None = None
    overrides: dict[str, Any] = {}

    def read(self) -> Settings:
        """Read the configuration as it is now.

        Raises:
            ConfigurationError: it is wrong, or the file is gone.
        """
        return load_settings(self.path, overrides=self.overrides)


def reloaded(running: Settings, read: Settings) -> tuple[Settings, tuple[str, ...]]:
    """What a running service takes over of a new configuration.

    Sockets, processes and devices stay as they are until the service is started again.

    Returns:
        The configuration from now on, and the keys whose change has to wait for a restart.
    """
    server, late_server = _keep(running.server, read.server, names=_FIXED_SERVER)
    limits, late_limits = _keep(running.limits, read.limits, names=_FIXED_LIMITS)
    partly = read.model_copy(update={"server": server, "limits": limits})
    settings, late = _keep(running, partly, names=_FIXED)
    late_keys = [f"server.{name}" for name in late_server]
    late_keys += [f"limits.{name}" for name in late_limits]
    return settings, (*late_keys, *late)


def _keep(running: M, read: M, *, names: tuple[str, ...]) -> tuple[M, list[str]]:
    """`read`, but with the running values of `names`; and those of them that differ."""
    late = [name for name in names if getattr(running, name) != getattr(read, name)]
    return read.model_copy(update={name: getattr(running, name) for name in names}), late
