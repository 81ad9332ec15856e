"""The connection of one HTTP process to one incarnation of one device worker."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import zmq

from models.price import Price
from models.shares import shared_wait
from models.types import ModelInfo, ModelKey
from service.devices.message_socket import MessageSocket
from service.devices.messages import (
    FromWorker,
    Hello,
    MalformedMessage,
    ToWorker,
    decode,
    encode,
)
from service.devices.runtime_dir import RuntimeDir
from service.devices.status import WorkerStatus, WorkerStatusFile

log = logging.getLogger("heatlens.client")

_RECONNECT_MS = 20


class WorkerConnection:
    """Sends messages to one worker process and receives its messages.

    Each incarnation has its own address, so that late messages never reach its successor.

    Attributes:
        infos: models of the device as last reported, by name and version.
        outstanding: what our jobs there are expected to cost, by job id.
    """

    def __init__(
        self,
        *,
        context: zmq.Context[zmq.Socket[bytes]],
        runtime: RuntimeDir,
        device: str,
        incarnation: int,
        on_message: Callable[[WorkerConnection, FromWorker], None],
    ) -> None:
        self.device = device
        self.incarnation = incarnation
        self.infos: dict[ModelKey, ModelInfo] = {}
        self.outstanding: dict[str, Price] = {}
        self._others_ms = 0.0
        self._others_at = 0.0
        self._on_message = on_message
        self._status = WorkerStatusFile.open(runtime.status_file(device, incarnation))
        socket = context.socket(zmq.DEALER)
        # Unlimited: the in-flight jobs of the pool bound the queue.
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.LINGER, 0)
        # The worker may bind after we connect.
        socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.connect(runtime.socket_url(device, incarnation))
        self._socket = MessageSocket(socket, self._receive)
        self.send(Hello())

    def send(self, message: ToWorker) -> None:
        """Queue a message; never waits."""
        self._socket.send(encode(message))

    def status(self) -> WorkerStatus | None:
        """The status of the worker; None if it has not written one yet."""
        return self._status.read()

    def note_others(self, others_ms: float) -> None:
        """Remember the estimated device time of the jobs that other clients have queued there."""
        self._others_ms, self._others_at = others_ms, time.monotonic()

    def wait_ms(self, *, long: bool) -> float:
        """Estimated wait of a new job there, less the time since the others' part was reported."""
        since_ms = 1000 * (time.monotonic() - self._others_at)
        queued = dict.fromkeys((False, True), 0.0)
        for price in self.outstanding.values():
            queued[price.long] += price.device_ms
        queued[False] += max(0.0, self._others_ms - since_ms)
        return shared_wait(queued[long], queued[not long], long=long)

    def close(self) -> None:
        """Stop receiving; messages that arrive later are dropped."""
        self._socket.close()
        self._status.close()

    def _receive(self, frames: Sequence[zmq.Frame]) -> None:
        try:
            message = decode([frame.buffer for frame in frames], FromWorker)
        except MalformedMessage:
            log.exception("device %s sent a malformed message", self.device)
        else:
            self._on_message(self, message)
