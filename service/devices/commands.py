"""Commands that load and unload models on running devices and record it in the catalog."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed, NotReady, UnknownModel
from models.types import Failure
from service.devices.connection import WorkerConnection
from service.devices.messages import Ack, Load, Unload, from_wire
from service.devices.runtime_dir import RuntimeDir, holds


@dataclass(slots=True, eq=False)
class _Command:
    """A load or unload that a worker has not acknowledged."""

    connection: WorkerConnection
    result: asyncio.Future[Failure | None]


class ModelCommands:
    """Sends commands to workers and waits for the acknowledgements."""

    def __init__(self, runtime: RuntimeDir) -> None:
        self._runtime = runtime
        self._pending: dict[str, _Command] = {}

    async def load(self, spec: ModelSpec, connections: Collection[WorkerConnection]) -> None:
        """Load or replace a model version on its devices.

        The first device loads it alone, so that a bad entry harms one device only.

        Args:
            spec: the model.
            connections: the current ones; read again at the end.

        Raises:
            ModelLoadFailed: it could not be loaded or verified.
            NotReady: none of its devices is up.
        """
        own = [connection for connection in connections if holds(spec, connection.device)]
        if not own:
            raise NotReady("None of the model's devices is up.")
        text = spec.model_dump_json()
        for group in (own[:1], own[1:]):
            up = [connection for connection in group if connection in connections]
            await self._run(
                [(connection, Load(request_id=_new_id(), spec=text)) for connection in up]
            )
        await asyncio.to_thread(self._runtime.change_catalog, lambda specs: _with(specs, spec))
        # Workers that have come up since may have read the catalog before it was changed.
        new = [
            connection
            for connection in connections
            if holds(spec, connection.device) and connection not in own
        ]
        await self._run([(connection, Load(request_id=_new_id(), spec=text)) for connection in new])

    async def unload(
        self, name: str, version: str | None, *, connections: Collection[WorkerConnection]
    ) -> None:
        """Drop a model version (None: all of them) everywhere once its jobs are done.

        Raises:
            UnknownModel: no device has it.
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
        await self._run(
            [
                (connection, Unload(request_id=_new_id(), name=name, version=version))
                for connection in own
            ]
        )

    def on_ack(self, ack: Ack) -> None:
        """Complete the acknowledged command."""
        command = self._pending.get(ack.request_id)
        if command is not None and not command.result.done():
            command.result.set_result(ack.failure)

    def on_disconnect(self, connection: WorkerConnection) -> None:
        """Fail the commands that an exited worker can no longer acknowledge."""
        lost = ModelLoadFailed("The device worker exited before the model was loaded.")
        for request_id, command in self._pending.items():
            if command.connection is connection and not command.result.done():
                command.result.set_result(Failure.of(request_id, lost))

    async def _run(self, commands: Sequence[tuple[WorkerConnection, Load | Unload]]) -> None:
        """Send commands and wait for all of them.

        Raises:
            HeatlensError: the first failure.
        """
        loop = asyncio.get_running_loop()
        results: list[asyncio.Future[Failure | None]] = []
        for connection, message in commands:
            results.append(loop.create_future())
            self._pending[message.request_id] = _Command(connection, results[-1])
            connection.send(message)
        try:
            failures = [
                failure for failure in await asyncio.gather(*results) if failure is not None
            ]
        finally:
            for _, message in commands:
                del self._pending[message.request_id]
        if failures:
            raise from_wire(failures[0])


def _new_id() -> str:
    return uuid.uuid4().hex


def _with(specs: Sequence[ModelSpec], spec: ModelSpec) -> list[ModelSpec]:
    return [*_without(specs, spec.name, spec.version), spec]


def _without(specs: Sequence[ModelSpec], name: str, version: str | None) -> list[ModelSpec]:
    return [s for s in specs if s.name != name or version not in {None, s.version}]
