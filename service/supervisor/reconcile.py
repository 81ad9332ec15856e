"""Makes the devices hold the models that the configuration names; a process that the supervisor starts for a reload.

    python -m service.supervisor.reconcile --runtime DIR --phase load|unload --parent PID

It gives orders over the same sockets as the admin API does. Exit code 0: all done; 1: the log says
what was not.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from models.catalog import ModelSpec
from models.errors import HeatlensError
from service.devices.runtime_dir import RuntimeDir, die_with_parent
from service.devices.socket_pool import SocketPool
from service.logs import configure_logging

log = logging.getLogger("heatlens.models")

_SETTLE_S = 300.0
_POLL_S = 0.05


async def load_wanted(runtime: RuntimeDir, pool: SocketPool) -> bool:
    """Load what is wanted but not there, different, or could not be loaded before; whether all went well."""
    ready = {(i.card.name, i.card.version) for i in pool.models() if i.card.ready}
    held = {(s.name, s.version): s for s in runtime.read_catalog()}
    well = True
    for spec in runtime.read_wanted():
        key = (spec.name, spec.version)
        if key in ready and held.get(key) == spec:
            continue
        try:
            await pool.load(spec)
        except HeatlensError as error:
            log.error("model %s@%s was not loaded: %s", *key, error.message)  # noqa: TRY400 # typed: the text says all
            well = False
        else:
            log.info("model %s@%s is loaded", *key)
    return well


async def unload_unwanted(runtime: RuntimeDir, pool: SocketPool) -> bool:
    """Unload what is there and not wanted; whether all went well."""
    wanted = {(spec.name, spec.version) for spec in runtime.read_wanted()}
    well = True
    for key in _keys(runtime.read_catalog()):
        if key in wanted:
            continue
        try:
            await pool.unload(*key)
        except HeatlensError as error:
            log.error("model %s@%s was not unloaded: %s", *key, error.message)  # noqa: TRY400 # typed: the text says all
            well = False
        else:
            log.info("model %s@%s is unloaded", *key)
    return well


async def settle(pool: SocketPool) -> None:
    """Wait until no device is about to load its first models; no longer than that may take."""
    until = time.monotonic() + _SETTLE_S
    while time.monotonic() < until:
        if not any(info.card.state == "loading" for info in pool.models()):
            return
        await asyncio.sleep(_POLL_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Give the orders of one phase; returns the exit code."""
    parser = argparse.ArgumentParser(prog="heatlens model orders")
    parser.add_argument("--runtime", type=Path, required=True)
    parser.add_argument("--phase", choices=("load", "unload"), required=True)
    parser.add_argument("--parent", type=int, required=True)
    parsed = parser.parse_args(arguments)
    die_with_parent(parsed.parent)
    runtime = RuntimeDir(parsed.runtime)
    configure_logging(runtime.read_settings().server.log_level)

    async def give_orders() -> bool:
        pool = SocketPool(runtime)
        await pool.start()
        try:
            await settle(pool)
            phase = load_wanted if parsed.phase == "load" else unload_unwanted
            return await phase(runtime, pool)
        finally:
            await pool.close()

    return 0 if asyncio.run(give_orders()) else 1


def _keys(specs: Sequence[ModelSpec]) -> list[tuple[str, str]]:
    return [(spec.name, spec.version) for spec in specs]


if __name__ == "__main__":
    sys.exit(main())
