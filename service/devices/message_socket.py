"""A ZeroMQ socket in an event loop.

pyzmq's own sockets for asyncio make a future, a turn of a task and several callbacks of each message,
which costs as much again as the message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq

from service.devices.messages import Frame


class MessageSocket:
    """Sends messages, and hands those that arrive to a function in the running event loop.

    Args:
        socket: bound or connected, without high-water marks; closed with this.
        on_frames: called with the frames of each message.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], on_frames: Callable[[list[zmq.Frame]], object]
    ) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._loop = asyncio.get_running_loop()
        self._descriptor: int = int(socket.get(zmq.FD))
        self._loop.add_reader(self._descriptor, self._read)
        self._read_if_any()

    def send(self, frames: Sequence[Frame]) -> None:
        """Queue a message; never waits."""
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        self._read_if_any()

    def close(self) -> None:
        """Hand over no more messages; those that were sent still leave, as the socket lingers."""
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)
            self._socket.close()

    def _read_if_any(self) -> None:
        # The descriptor tells of a change once, and any use of the socket may take note of it.
        if self._has_message():
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        while not self._socket.closed and self._has_message():
            self._on_frames(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))

    def _has_message(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)
