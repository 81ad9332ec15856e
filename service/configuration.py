"""The configuration: a TOML file and `HEATLENS_*` variables, read again on reload.

The first source that sets a key wins: arguments of `load_settings`, environment, file, defaults.
Variables separate nested keys by `__` (`HEATLENS_LIMITS__MAX_IMAGES=8`). A list is separated by
commas, or JSON. Other variables, such as an orchestrator's `HEATLENS_PORT`, are ignored.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from service.settings import Settings

_ENV_PREFIX = "HEATLENS_"
_ENV_DELIMITER = "__"

_TABLE = re.compile(r"\s*\[(?P<array>\[)?\s*(?P<name>[\w. -]+?)\s*\]")
_KEY = re.compile(r"\s*(?P<name>[\w.-]+)\s*=")

_REMOVED_SECTIONS = {
    "metrics": "metrics.nv_aliases was removed: the recording rules in deploy/prometheus/triton.yml"
    " provide Triton's metric names",
}

_GRPC_MISSING = "server.grpc_port: gRPC is not installed: pip install 'heatlens[grpc]'."

# Sockets, processes and devices stay as they are on reload.
_FIXED_KEYS = (
    "server.host",
    "server.port",
    "server.http_workers",
    "server.grpc_port",
    "server.devices",
    "limits.max_wait_s",
    "workers",
    "tracing",
    "base_dir",
)


class ConfigurationError(ValueError):
    """The configuration is wrong; the text names the key and never repeats a secret."""


def load_settings(
    config: Path | None = None, *, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Read, merge and check the configuration.

    Args:
        config: a TOML file; None = none.
        overrides: nested values that win over everything, such as `{"server": {"port": 9000}}`.

    Raises:
        ConfigurationError: a file that cannot be read, an unknown key or a wrong value; the text
            names it.
    """
    _check_variables()
    if config is not None and not config.is_file():
        raise ConfigurationError(f"{config} is not a file.")
    try:
        sourced = _sources(config)(**overrides or {})
    except OSError as error:
        raise ConfigurationError(f"{config}: {error.strerror or 'cannot be read'}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{config} is not valid TOML: {error}") from None
    except SettingsError as error:
        raise ConfigurationError(str(error)) from None
    except ValidationError as error:
        raise ConfigurationError(_describe(error, config)) from None
    if sourced.server.grpc_port is not None and find_spec("grpc") is None:
        raise ConfigurationError(_GRPC_MISSING)
    folder = config.parent if config else Path()
    return Settings(**{**dict(sourced), "base_dir": (folder / sourced.base_dir).resolve()})


def _sources(config: Path | None) -> type[Settings]:
    """Make a class of settings that reads arguments, the environment and `config`."""

    class Sources(Settings, BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=_ENV_PREFIX, env_nested_delimiter=_ENV_DELIMITER, toml_file=config
        )
        # Relative to the folder of the file.
        base_dir: Path = Path()

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    return Sources


def _check_variables() -> None:
    """Refuse variables of sections that do not exist, which pydantic-settings would ignore."""
    for name in os.environ:
        section, nested, _ = name.removeprefix(_ENV_PREFIX).lower().partition(_ENV_DELIMITER)
        if name.startswith(_ENV_PREFIX) and nested and section not in Settings.model_fields:
            text = _REMOVED_SECTIONS.get(section, f"unknown section {section}")
            raise ConfigurationError(f"{name}: {text}.")


def _describe(error: ValidationError, config: Path | None) -> str:
    text = config.read_text(encoding="utf-8") if config else ""
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        key = ".".join(map(str, item["loc"]))
        cause = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            cause = _REMOVED_SECTIONS.get(key) or _unknown(item["loc"])
        line = line_of(text, item["loc"])
        place = f"{config.name}, line {line}: " if config and line else ""
        lines.append(f"{place}{key}: {cause}")
    return "; ".join(lines)


def _unknown(location: Sequence[str | int]) -> str:
    """That there is no such key, and which one may be meant."""
    kind: type[BaseModel] | None = Settings
    *path, key = location
    for part in path:
        if kind is not None and isinstance(part, str):
            field = kind.model_fields.get(part)
            kind = None if field is None else _model_in(field.annotation)
    if kind is None:
        return "unknown key"
    likely = get_close_matches(str(key), kind.model_fields, n=1)
    return (
        f"unknown key; did you mean {likely[0]}?"
        if likely
        else (f"unknown key; known are {', '.join(kind.model_fields)}")
    )


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation names, as an item of a list or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def line_of(text: str, location: Sequence[str | int]) -> int | None:
    """The line, from 1, of a key in a TOML file, or of its table; None if it is in neither.

    Its location is a path such as `("models", 0, "source")`.
    """
    table: list[str | int] = []
    counts: Counter[str] = Counter()
    found: int | None = None
    longest = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            name = header["name"].replace(" ", "")
            if header["array"]:
                table = [name, counts[name]]
                counts[name] += 1
            else:
                first, *rest = name.split(".")
                # A table of an array belongs to its last entry.
                table = [first, counts[first] - 1, *rest] if counts[first] else [first, *rest]
            path = table
        elif key := _KEY.match(line):
            path = [*table, *key["name"].split(".")]
        else:
            continue
        if len(path) > longest and list(location[: len(path)]) == path:
            found, longest = number, len(path)
    return found


class ConfigurationSource(BaseModel):
    """A file and the flags of the command line, from which any process can read the settings.

    Attributes:
        path: the TOML file, absolute; None = none.
        overrides: nested values that win over file and environment.
    """

    model_config = ConfigDict(frozen=True)

    path: Path | None = None
    overrides: dict[str, Any] = {}

    def read(self) -> Settings:
        """Read the configuration as it is now; see `load_settings`."""
        return load_settings(self.path, overrides=self.overrides)


def reloaded(running: Settings, read: Settings) -> tuple[Settings, tuple[str, ...]]:
    """Merge a new configuration into that of a running service.

    Returns:
        The configuration from now on, and the keys that change only with a restart.
    """
    old, new = running.model_dump(), read.model_dump()
    late = []
    for key in _FIXED_KEYS:
        section, _, name = key.rpartition(".")
        before, after = (old[section], new[section]) if section else (old, new)
        if before[name] != after[name]:
            after[name] = before[name]
            late.append(key)
    return Settings.model_validate(new), tuple(late)
