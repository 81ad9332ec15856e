"""Where the configuration came from, so that it can be read again while the service runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from service.settings import Settings, load_settings

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
