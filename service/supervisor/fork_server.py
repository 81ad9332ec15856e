"""Starts workers of CPUs as forks of one process, which has imported torch for all of them."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from service.devices.forks import LARGEST_MESSAGE, Exited, Forked, FromForkServer
from service.supervisor.child import Command, describe_exit

log = logging.getLogger("heatlens.supervisor")

_EXIT_S = 5.0


class ForkServer:
    """Makes processes as `service.worker.fork_server` forks them; it is started with the first one.

    When it ends, so do all that it has forked, and the next one to be started starts it again.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Take its program and first arguments."""
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._asked: deque[Fork] = deque()
        self._forks: dict[int, Fork] = {}

    def descriptors(self) -> Sequence[int]:
        """What becomes readable when there is news of a fork."""
        return [] if self._socket is None else [self._socket.fileno()]

    def start(self, arguments: Sequence[str], *, environment: Mapping[str, str]) -> Fork:
        """Ask for a process with these arguments; all have the environment of the first one."""
        if self._socket is None or not self.is_running():
            self._open(environment)
        fork = Fork(self)
        self._asked.append(fork)
        assert self._socket is not None
        # One that ends just now is found out by `is_running`.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.send(msgspec.json.encode(arguments))
        return fork

    def is_running(self) -> bool:
        """Whether it runs; if it has ended, its forks are told."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        log.error("the fork server exited: %s; its workers end with it", describe_exit(code))
        self._bury()
        return False

    def news(self, *, timeout_s: float = 0.0) -> None:
        """Tell forks what has become of them."""
        if self.is_running() and self._socket is not None:
            select.select([self._socket], [], [], timeout_s)
            self._read()

    def kill(self) -> None:
        """End it, and with it all that it has forked."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._bury()

    def _open(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = Command(self._command, inherit=[theirs.fileno()])
            socket_option = ["--socket", str(theirs.fileno())]
            self._process = command.start(socket_option, environment=environment)
        self._socket = ours

    def _bury(self) -> None:
        assert self._socket is not None
        self._read()
        for fork in (*self._asked, *self._forks.values()):
            fork.code = -signal.SIGKILL
        self._socket.close()
        self._socket = self._process = None
        self._asked.clear()
        self._forks.clear()

    def _read(self) -> None:
        assert self._socket is not None
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := self._socket.recv(LARGEST_MESSAGE, socket.MSG_DONTWAIT):
                match msgspec.json.decode(data, type=FromForkServer):
                    case Forked(pid=pid):
                        fork = self._forks[pid] = self._asked.popleft()
                        fork.pid = pid
                    case Exited(pid=pid, code=code):
                        self._forks.pop(pid).code = code


class Fork:
    """A process that was asked for, with what `subprocess.Popen` has of it.

    Attributes:
        pid: its process id; None while its turn has not come.
        code: what it exited with; None while it has not.
    """

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self.pid: int | None = None
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code, once it has exited (negative: the signal that ended it)."""
        self._server.news()
        return self.code

    def send_signal(self, number: int) -> None:
        """Signal it; where its turn has not come, the whole fork server ends."""
        if self.poll() is not None:
            return
        if self.pid is None:
            self._server.kill()
            return
        # Its parent tells of its exit at once: the number is not another process's yet.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its exit; one that does not come in time ends the whole fork server."""
        deadline = time.monotonic() + _EXIT_S
        while self.poll() is None:
            left_s = deadline - time.monotonic()
            if left_s > 0:
                self._server.news(timeout_s=left_s)
            else:
                self._server.kill()
        assert self.code is not None
        return self.code
