"""Loading and unloading models on running devices, and remembering it for workers that start later."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed, NotReady, UnknownModel
from models.types import Failure
from service.devices.connection import WorkerConnection
from service.devices.messages import Ack, Load, Unload, from_wire, to_wire
from service.devices.runtime_dir import RuntimeDir, holds


@dataclass(slots=True, eq=False)
class _Command:
    """A load or unload that a worker has not acknowledged."""

    link: WorkerConnection
    end: asyncio.Future[Failure | None]


class ModelCommands:
    """Gives workers their orders and waits for the acknowledgements."""

    def __init__(self, runtime: RuntimeDir) -> None:
        self._runtime = runtime
        self._open: dict[str, _Command] = {}

    async def load(self, spec: ModelSpec, links: Collection[WorkerConnection]) -> None:
        """Load or replace a model version on its devices; the first one alone, so that a bad entry harms one only.

        Args:
            spec: the model.
            links: those that are up; looked at again in the end.

        Raises:
            ModelLoadFailed: it could not be loaded or verified.
            NotReady: none of its devices is up.
        """
        own = [link for link in links if holds(spec, link.device)]
        if not own:
            raise NotReady("None of the model's devices is up.")
        text = spec.model_dump_json()
        for group in (own[:1], own[1:]):
            up = [link for link in group if link in links]
            await self._run([(link, Load(request_id=_new_id(), spec=text)) for link in up])
        await asyncio.to_thread(self._runtime.change_catalog, lambda specs: _with(specs, spec))
        # Workers that have come up since may have read the catalog before it was changed.
        new = [link for link in links if holds(spec, link.device) and link not in own]
        await self._run([(link, Load(request_id=_new_id(), spec=text)) for link in new])

    async def unload(
        self, name: str, version: str | None, *, links: Collection[WorkerConnection]
    ) -> None:
        """Drop a model version (None: all of them) everywhere once its jobs are done.

        Raises:
            UnknownModel: no device has it.
        """
        own = [
            link
            for link in links
            if any(key[0] == name and version in {None, key[1]} for key in link.infos)
        ]
        if not own:
            raise UnknownModel("No such model is loaded.", field="model")
        # Forgotten first: a worker that restarts meanwhile must not load it again.
        await asyncio.to_thread(
            self._runtime.change_catalog, lambda specs: _without(specs, name, version)
        )
        await self._run(
            [(link, Unload(request_id=_new_id(), name=name, version=version)) for link in own]
        )

    def settle(self, ack: Ack) -> None:
        """Take an acknowledgement."""
        order = self._open.get(ack.request_id)
        if order is not None and not order.end.done():
            order.end.set_result(ack.failure)

    def lose(self, link: WorkerConnection) -> None:
        """End what a worker that died can no longer acknowledge."""
        lost = ModelLoadFailed("The device worker ended before it was done.")
        for request_id, order in self._open.items():
            if order.link is link and not order.end.done():
                order.end.set_result(to_wire(request_id, lost))

    async def _run(self, orders: Sequence[tuple[WorkerConnection, Load | Unload]]) -> None:
        """Send orders and wait for all of them.

        Raises:
            HeatlensError: the first failure.
        """
        loop = asyncio.get_running_loop()
        ends: list[asyncio.Future[Failure | None]] = []
        for link, message in orders:
            ends.append(loop.create_future())
            self._open[message.request_id] = _Command(link, ends[-1])
            link.send(message)
        try:
            failures = [failure for failure in await asyncio.gather(*ends) if failure is not None]
        finally:
            for _, message in orders:
                del self._open[message.request_id]
        if failures:
            raise from_wire(failures[0])


def _new_id() -> str:
    return uuid.uuid4().hex


def _with(specs: Sequence[ModelSpec], spec: ModelSpec) -> list[ModelSpec]:
    return [*_without(specs, spec.name, spec.version), spec]


def _without(specs: Sequence[ModelSpec], name: str, version: str | None) -> list[ModelSpec]:
    return [s for s in specs if s.name != name or version not in {None, s.version}]
