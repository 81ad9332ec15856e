"""`SocketPool`: the devices as an HTTP process sees them, over the workers' sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import zmq.asyncio

from models.catalog import ModelSpec
from models.errors import (
    DeadlineExceeded,
    Draining,
    HeatlensError,
    InputQuarantined,
    ModelReplaced,
    NotReady,
    Overloaded,
    UnknownModel,
    WorkerLost,
)
from models.types import Failure, Job, ModelInfo, Outcome
from service.devices.commands import ModelCommands
from service.devices.connection import WorkerConnection
from service.devices.messages import (
    Ack,
    Cancel,
    Completions,
    FromWorker,
    Models,
    Submit,
    from_wire,
    to_wire,
)
from service.devices.model_state import job_ms, keep_known_models, loading_model, merge
from service.devices.pool import DeviceStatus
from service.devices.runtime_dir import RuntimeDir, holds
from service.devices.status import DeviceState, DeviceStates, DeviceStatesFile

_POLL_S = 0.02
_MAX_WAITING = 512
_NEWS_S = 1.0
_NEWS_POLL_S = 0.002


@dataclass(slots=True, eq=False)
class _InFlight:
    """A job that somebody awaits; `link` is None while no device can take it."""

    job: Job
    end: asyncio.Future[Outcome | Failure]
    link: WorkerConnection | None = None
    was_sent: bool = False


class SocketPool:
    """Implements `DevicePool`: routes jobs to workers and outlives them.

    A job goes to the device with the least estimated work among those where its model is warm. When
    a worker dies, its unanswered jobs go elsewhere or wait for its restart. Jobs that were on the
    device are suspects: each is tried once more, alone; if that kills a worker too, the input is
    quarantined.

    Args:
        runtime: the supervisor's folder.
        ready_within_s: age up to which a device's last pass counts as proof of its health.
    """

    def __init__(self, runtime: RuntimeDir, *, ready_within_s: float = 30.0) -> None:
        self._runtime = runtime
        self._ready_within_s = ready_within_s
        self._fleet = DeviceStates()
        self._links: dict[str, WorkerConnection] = {}
        self._said: dict[str, Sequence[ModelInfo]] = {}
        self._models: list[ModelInfo] | None = None
        self._tickets: dict[str, _InFlight] = {}
        self._orders = ModelCommands(runtime)
        self._quarantined: frozenset[str] = frozenset()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Read the fleet and connect; returns once those devices that are ready have named their models."""
        self._context = zmq.asyncio.Context()
        self._fleet_file = DeviceStatesFile.open(self._runtime.states_file)
        specs = self._runtime.read_catalog()
        for life in self._fleet_file.read().devices:
            self._said[life.device] = [
                loading_model(spec) for spec in specs if holds(spec, life.device)
            ]
        self._apply(self._fleet_file.read())
        self._watching = asyncio.create_task(self._watch())
        until = time.monotonic() + _NEWS_S
        while time.monotonic() < until and any(map(_is_awaited, self._links.values())):  # noqa: ASYNC110 # it is milliseconds, once
            await asyncio.sleep(_NEWS_POLL_S)

    async def close(self) -> None:
        """Refuse new jobs, fail the outstanding ones with `Draining`, disconnect."""
        self.refuse()
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        for link in self._links.values():
            await link.close()
        self._links.clear()
        if self._closing:
            await asyncio.wait(self._closing)
        self._context.destroy(linger=0)
        self._fleet_file.close()

    def refuse(self) -> None:
        """Take no new job, and fail the outstanding ones with `Draining`, now."""
        self._closed = True
        for ticket in self._tickets.values():
            self._fail(ticket, Draining("The service is stopping."))

    # ---------------------------------------------------------------- jobs

    async def submit(self, job: Job) -> Outcome:
        """Run one job; see `DevicePool.submit`."""
        if self._closed:
            raise Draining("The service is stopping.")
        ticket = _InFlight(job, asyncio.get_running_loop().create_future())
        self._tickets[job.id] = ticket
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                self._dispatch(ticket)
                end = await ticket.end
        except TimeoutError:
            raise DeadlineExceeded("The deadline passed before the answer was ready.") from None
        finally:
            self._discard(ticket)
        if isinstance(end, Failure):
            raise from_wire(end)
        return end

    def _discard(self, ticket: _InFlight) -> None:
        del self._tickets[ticket.job.id]
        if ticket.link is not None:
            ticket.link.outstanding.pop(ticket.job.id, None)
            if not ticket.end.done() or ticket.end.cancelled():
                ticket.link.send(Cancel(job_id=ticket.job.id))

    def _dispatch(self, ticket: _InFlight) -> None:
        """Send a job to a device, let it wait for one, or fail it where none can come."""
        job = ticket.job
        if job.digest and job.digest in self._quarantined:
            self._fail(ticket, _quarantined())
            return
        key = (job.model, job.version)
        ready = [
            link
            for link in self._links.values()
            if key in link.infos and link.infos[key].card.ready
        ]
        if not ready:
            hopeless = self._hopeless(ticket)
            if isinstance(hopeless, UnknownModel) and job.fingerprint:  # it was there a moment ago
                hopeless = ModelReplaced("The model was unloaded; ask again.")
            if hopeless is not None:
                self._fail(ticket, hopeless)
            return
        fitting = [
            link for link in ready if job.fingerprint in {"", link.infos[key].card.fingerprint}
        ]
        if not fitting:
            self._fail(ticket, ModelReplaced("The model was replaced; ask again."))
            return
        link = min(fitting, key=WorkerConnection.load_ms)
        link.outstanding[job.id] = job_ms(link.infos[key].card)
        ticket.link, ticket.was_sent = link, True
        link.send(Submit(job=job))

    def _hopeless(self, ticket: _InFlight) -> HeatlensError | None:
        """Why it makes no sense to wait for a device; None if it does."""
        if all(life.life == "given_up" for life in self._fleet.devices):
            if ticket.was_sent:
                return WorkerLost("The device worker was lost and is not coming back.")
            return NotReady("No device is left.")
        key = (ticket.job.model, ticket.job.version)
        known = {(info.card.name, info.card.version): info.card for info in self.models()}
        if key not in known:
            return UnknownModel("No such model is loaded.", field="model")
        if known[key].state == "unavailable":
            return NotReady(known[key].reason or "The model is unavailable.")
        waiting = sum(other.link is None for other in self._tickets.values())
        if waiting > _MAX_WAITING:
            return Overloaded("Too many requests wait for a device.", retry_after_s=1.0)
        return None

    def _fail(self, ticket: _InFlight, error: HeatlensError) -> None:
        if not ticket.end.done():
            ticket.end.set_result(to_wire(ticket.job.id, error))

    def _dispatch_waiting(self) -> None:
        for ticket in list(self._tickets.values()):
            if ticket.link is None and not ticket.end.done():
                self._dispatch(ticket)

    # ---------------------------------------------------------------- devices

    async def _watch(self) -> None:
        while True:
            fleet = self._fleet_file.read()
            if fleet is not self._fleet:
                self._apply(fleet)
            await asyncio.sleep(_POLL_S)

    def _apply(self, fleet: DeviceStates) -> None:
        """Close the links of workers that died, open those of new ones, and see to the jobs that wait."""
        self._fleet = fleet
        self._quarantined = frozenset(fleet.quarantined)
        self._models = None
        for life in fleet.devices:
            link = self._links.get(life.device)
            if link is not None and (life.life != "up" or life.incarnation != link.incarnation):
                self._on_disconnect(link, life)
            if life.life == "up" and life.device not in self._links:
                self._links[life.device] = WorkerConnection(
                    context=self._context,
                    runtime=self._runtime,
                    device=life.device,
                    incarnation=life.incarnation,
                    on_message=self._on_message,
                )
        self._dispatch_waiting()

    def _on_disconnect(self, link: WorkerConnection, life: DeviceState) -> None:
        del self._links[link.device]
        closing = asyncio.create_task(link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        deaths = [death for death in life.deaths if death.incarnation == link.incarnation]
        suspects = {job_id for death in deaths for job_id in death.suspects}
        for ticket in self._tickets.values():
            if ticket.link is link:
                ticket.link = None
                if ticket.job.id in suspects:
                    self._suspect(ticket)
        self._orders.lose(link)

    def _suspect(self, ticket: _InFlight) -> None:
        """Count a death for a job that was on the device; the second one ends it."""
        ticket.job = msgspec.structs.replace(ticket.job, deaths=ticket.job.deaths + 1)
        if ticket.job.deaths >= 2:
            self._fail(ticket, _quarantined())

    def _on_message(self, link: WorkerConnection, message: FromWorker) -> None:
        match message:
            case Completions(outcomes=outcomes, failures=failures, others_ms=others_ms):
                link.note_others(others_ms)
                for outcome in outcomes:
                    self._end(link, msgspec.structs.replace(outcome, device=link.device))
                for failure in failures:
                    self._end(link, failure)
            case Models(infos=infos):
                link.infos = {(info.card.name, info.card.version): info for info in infos}
                self._said[link.device] = keep_known_models(self._said[link.device], infos)
                self._models = None
                self._dispatch_waiting()
            case Ack():
                self._orders.settle(message)

    def _end(self, link: WorkerConnection, end: Outcome | Failure) -> None:
        ticket = self._tickets.get(end.id)
        if ticket is not None and ticket.link is link and not ticket.end.done():
            ticket.end.set_result(end)

    # ---------------------------------------------------------------- what there is

    def models(self) -> Sequence[ModelInfo]:
        """Every configured model version, devices merged."""
        if self._models is None:
            lives = self._fleet.devices
            self._models = merge(
                self._said,
                connected=self._links,
                coming={life.device for life in lives if life.life != "given_up"},
            )
        return self._models

    def devices(self) -> Sequence[DeviceStatus]:
        """Every configured device."""
        return [self._status(life) for life in self._fleet.devices]

    def _status(self, life: DeviceState) -> DeviceStatus:
        link = self._links.get(life.device)
        board = link.board() if link is not None else None
        if board is None:
            state = "starting" if life.life == "up" or life.incarnation == 0 else "lost"
            return DeviceStatus(
                device=life.device,
                state="draining" if self._fleet.draining else state,
                restarts=life.restarts,
                restart_reasons=life.restart_reasons,
            )
        last_pass_s = time.monotonic() - board.last_pass if board.last_pass else None
        state = "starting"
        if board.ready and last_pass_s is not None:
            state = "ready" if last_pass_s <= self._ready_within_s else "lost"
        return DeviceStatus(
            device=life.device,
            state="draining" if self._fleet.draining else state,
            last_pass_s=last_pass_s,
            queue_depth=board.queue_depth,
            wait_ms=board.wait_ms,
            models=board.models,
            restarts=life.restarts,
            restart_reasons=life.restart_reasons,
            memory_bytes=board.memory_bytes,
            batches=board.batches,
        )

    # ---------------------------------------------------------------- loading

    async def load(self, spec: ModelSpec) -> None:
        """Load or replace a model version on its devices; see `DevicePool.load`."""
        await self._orders.load(spec, self._links.values())

    async def unload(self, name: str, version: str | None = None) -> None:
        """Let a model (version) finish its jobs, then drop it; see `DevicePool.unload`."""
        await self._orders.unload(name, version, links=self._links.values())


def _is_awaited(link: WorkerConnection) -> bool:
    """Whether a device that is ready has not yet answered our Hello: it would be taken for one that loads."""
    board = link.board()
    return board is not None and board.ready and not link.infos


def _quarantined() -> InputQuarantined:
    return InputQuarantined(
        "This input was on a device when it failed, twice; it is not tried again."
    )
