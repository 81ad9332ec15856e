"""The fork server: imports torch once, and forks each worker of a CPU off itself.

    python -P -m service.worker.fork_server --runtime DIR --socket FD --parent PID

A worker that takes the place of another one need not wait for imports, and all share their memory. This
process has a single thread, runs no model and imports no code of users, so that little can go wrong in it.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from models.heap import leave_imports_alone
from service.devices.forks import LARGEST_MESSAGE, Exited, Forked, FromForkServer
from service.devices.lifeline import die_with_parent
from service.devices.runtime_dir import RuntimeDir
from service.worker import process
from service.worker.backend import import_libraries

log = logging.getLogger("heatlens.worker")

Run = Callable[[Sequence[str]], int]


def serve(requests: socket.socket, run: Run) -> None:
    """Fork a process for each list of arguments that comes, and tell of it and of its exit.

    Args:
        requests: where they come from; see `service.devices.forks`. Returns when it is closed.
        run: what a fork does with its arguments; returns its exit code.
    """
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Without a handler nothing is written.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([requests.fileno(), reader], [], [])
        if reader in ready:
            os.read(reader, 4096)
            _tell_exits(requests)
        if requests.fileno() in ready:
            data = requests.recv(LARGEST_MESSAGE)
            if not data:
                return
            parent, pid = os.getpid(), os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                requests.close()
                _end_as(run, [*msgspec.json.decode(data, type=list[str]), "--parent", str(parent)])
            _tell(requests, Forked(pid=pid))


def _end_as(run: Run, arguments: Sequence[str]) -> None:
    """Run a fork to its end. Nothing of the server's may run in it, and its exit has nothing to wait for."""
    code = 1
    try:
        # Ctrl-C in a terminal reaches only the supervisor.
        os.setpgid(0, 0)
        code = run(arguments)
    except BaseException:
        log.exception("a worker failed")
    finally:
        os._exit(code)


def _tell_exits(requests: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _tell(requests, Exited(pid=pid, code=os.waitstatus_to_exitcode(status)))


def _tell(requests: socket.socket, news: FromForkServer) -> None:
    requests.send(msgspec.json.encode(news))


def main() -> None:
    """Import what workers need, and fork them until the supervisor ends."""
    gc.disable()
    parser = argparse.ArgumentParser(prog="heatlens fork server")
    parser.add_argument("--runtime", type=lambda path: RuntimeDir(Path(path)), required=True)
    for name in ("--socket", "--parent"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent)
    requests = socket.socket(fileno=options.socket)
    import_libraries(options.runtime.read_catalog())
    # A collection writes into every object that it looks at: forks would share none of them any more.
    leave_imports_alone()
    serve(requests, process.main)


if __name__ == "__main__":
    main()
