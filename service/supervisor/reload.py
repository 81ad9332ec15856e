"""A new configuration for a running service: models first, then HTTP processes, then what is no longer wanted."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Sequence
from typing import Literal

from service.configuration import ConfigurationError, ConfigurationSource, reloaded
from service.settings import Settings
from service.supervisor.child import Child, RestartBudget
from service.supervisor.http_process import HttpLaunch, HttpProcess

log = logging.getLogger("heatlens.supervisor")

RECONCILE_COMMAND = (sys.executable, "-m", "service.supervisor.reconcile")

_Phase = Literal["idle", "loading", "rolling", "unloading"]


class Reload:
    """Takes over a new configuration step by step, while everything is served.

    1. New and changed models are loaded, by a process of its own that gives the workers their
      orders.
    2. HTTP processes are replaced one at a time, if anything that they go by has changed.
    3. Models that are no longer configured are unloaded.

    A step that fails ends it: what was loaded stays loaded, nothing is unloaded, and the old
    configuration stays.

    Attributes:
        settings: the configuration in force.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        source: ConfigurationSource,
        launch: HttpLaunch,
        slots: Sequence[HttpProcess],
    ) -> None:
        self.settings = settings
        self._source = source
        self._launch = launch
        self._slots = tuple(slots)
        self._phase: _Phase = "idle"
        self._next = settings
        self._waiting: deque[HttpProcess] = deque()
        self._rolling: HttpProcess | None = None
        self._helper: Child | None = None

    @property
    def busy(self) -> bool:
        """Whether a reload is under way."""
        return self._phase != "idle"

    def children(self) -> list[Child]:
        """The process that gives orders, if there is one."""
        return [self._helper] if self._helper is not None else []

    def begin(self, now: float) -> None:
        """Read the configuration again and start to take it over."""
        try:
            read = self._source.read()
        except ConfigurationError as error:
            log.error("the configuration is wrong, the old one stays: %s", error)  # noqa: TRY400 # no trace needed
            return
        self._next, late = reloaded(self.settings, read)
        for key in late:
            log.warning("%s has changed: that takes a restart of the service", key)
        log.info("reloading the configuration")
        self._launch.runtime.write_wanted(self._next.models)
        self._order("load", now)
        self._phase = "loading"

    def tick(self, now: float) -> None:
        """Go on as far as can be."""
        match self._phase:
            case "loading":
                code = self._helper_code()
                if code == 0:
                    self._start_rolling()
                elif code is not None:
                    self._fail("not every model could be loaded")
            case "rolling":
                self._roll(now)
            case "unloading":
                code = self._helper_code()
                if code is not None:
                    self._phase = "idle"
                    log.info("the configuration is reloaded")
            case "idle":
                pass

    def _start_rolling(self) -> None:
        self._phase = "rolling"
        self._launch.runtime.write_settings(self._next)  # for the processes that start from now on
        self._waiting = deque(self._slots if self._next != self.settings else ())

    def _roll(self, now: float) -> None:
        slot = self._rolling
        if slot is not None:
            slot.advance(self._launch, now, grace_s=self._next.server.grace_s)
            if slot.replacement_failed:
                self._launch.runtime.write_settings(self.settings)
                self._fail("a new HTTP process did not start to serve")
                return
            if slot.replacing:
                return
        self._rolling = None
        if self._waiting:
            self._rolling = self._waiting.popleft()
            self._rolling.replace(self._launch, now)
            return
        self.settings = self._next
        self._order("unload", now)
        self._phase = "unloading"

    def _fail(self, reason: str) -> None:
        log.error("the configuration is not reloaded, the old one stays: %s", reason)
        self._rolling = None
        self._waiting.clear()
        self._phase = "idle"

    def _order(self, phase: Literal["load", "unload"], now: float) -> None:
        self._helper = Child(name="model orders", budget=RestartBudget(restarts=0, window_s=1))
        arguments = {
            "--runtime": str(self._launch.runtime.path),
            "--phase": phase,
            "--parent": str(os.getpid()),
        }
        words = (word for pair in arguments.items() for word in pair)
        self._helper.start([*RECONCILE_COMMAND, *words], now=now, environment={})

    def _helper_code(self) -> int | None:
        code = self._helper.reap() if self._helper is not None else None
        if code is not None:
            self._helper = None
        return code
