"""Commands that load and unload models on running devices and record it in the catalog."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed, NotReady, UnknownModel
from models.types import Failure
from service.devices.connection import WorkerConnection
from service.devices.messages import Ack, Load, Unload, from_wire
from service.devices.runtime_dir import RuntimeDir, holds


class ModelCommands:
    """Sends commands to workers and waits for the acknowledgements."""

    def __init__(self, runtime: RuntimeDir) -> None:
        self._runtime = runtime
        self._pending: dict[str, tuple[WorkerConnection, asyncio.Future[Failure | None]]] = {}

    async def load(self, spec: ModelSpec, connections: Collection[WorkerConnection]) -> None:
        """Load or replace a model version on its devices.

        The first device loads it alone, so that a bad entry harms one device only.

        Args:
            spec: the model.
            connections: a live view of the current ones, because they change meanwhile.

        Raises:
            ModelLoadFailed: it could not be loaded or verified.
            NotReady: none of its devices is up.
        """
        own = [connection for connection in connections if holds(spec, connection.device)]
        if not own:
            raise NotReady("None of the model's devices is up.")
        text = spec.model_dump_json()

        def message(request_id: str) -> Load:
            return Load(request_id=request_id, spec=text)

        for group in (own[:1], own[1:]):
            await self._run(message, (c for c in group if c in connections))
        await asyncio.to_thread(self._runtime.change_catalog, lambda specs: _with(specs, spec))
        # Workers that have come up since may have read the catalog before it was changed.
        new = [c for c in connections if holds(spec, c.device) and c not in own]
        await self._run(message, new)

    async def unload(
        self, name: str, version: str | None, *, connections: Collection[WorkerConnection]
    ) -> None:
        """Drop a model version (None: all of them) everywhere once its jobs are done.

        Raises:
            UnknownModel: it is not loaded on any device.
        """
        own = [
            connection
            for connection in connections
            if any(key[0] == name and version in {None, key[1]} for key in connection.infos)
        ]
        if not own:
            raise UnknownModel("No such model is loaded.", field="model")
        # Removed first: a worker that restarts meanwhile must not load it again.
        await asyncio.to_thread(
            self._runtime.change_catalog, lambda specs: _without(specs, name, version)
        )
        await self._run(lambda id_: Unload(request_id=id_, name=name, version=version), own)

    def on_ack(self, ack: Ack) -> None:
        """Complete the acknowledged command."""
        if ack.request_id in self._pending:
            _, result = self._pending[ack.request_id]
            if not result.done():
                result.set_result(ack.failure)

    def on_disconnect(self, connection: WorkerConnection) -> None:
        """Fail the commands that an exited worker can no longer acknowledge."""
        lost = ModelLoadFailed("The device worker exited before the model was loaded.")
        for request_id, (receiver, result) in self._pending.items():
            if receiver is connection and not result.done():
                result.set_result(Failure.of(request_id, lost))

    async def _run(
        self, message: Callable[[str], Load | Unload], connections: Iterable[WorkerConnection]
    ) -> None:
        """Send a command, made for its request id, to each worker, and wait for all of them.

        Raises:
            HeatlensError: the first failure.
        """
        loop = asyncio.get_running_loop()
        own: dict[str, asyncio.Future[Failure | None]] = {}
        for connection in connections:
            request_id = uuid.uuid4().hex
            own[request_id] = loop.create_future()
            self._pending[request_id] = (connection, own[request_id])
            connection.send(message(request_id))
        try:
            failures = [f for f in await asyncio.gather(*own.values()) if f is not None]
        finally:
            for request_id in own:
                del self._pending[request_id]
        if failures:
            raise from_wire(failures[0])


def _with(specs: Sequence[ModelSpec], spec: ModelSpec) -> list[ModelSpec]:
    return [*_without(specs, spec.name, spec.version), spec]


def _without(specs: Sequence[ModelSpec], name: str, version: str | None) -> list[ModelSpec]:
    return [s for s in specs if s.name != name or version not in {None, s.version}]
