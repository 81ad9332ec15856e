"""A fork server whose forks do what their arguments say, for `ForkServer(command)`."""

from __future__ import annotations

import os
import socket
import sys
import time

from service.devices.lifeline import die_with_parent
from service.worker.fork_server import serve


def run(arguments):
    do, value, _, parent = arguments
    die_with_parent(int(parent))
    if do == "exit":
        return int(value)
    if do == "print":
        sys.stdout.write(f"{os.environ[value]} {os.getpgid(0) == os.getpid()}\n")
        sys.stdout.flush()
        return 0
    if do == "raise":
        raise RuntimeError(value)
    time.sleep(float(value))
    return 0


if __name__ == "__main__":
    slow_s, _, descriptor, _, parent = sys.argv[1:]
    die_with_parent(int(parent))
    time.sleep(float(slow_s))
    serve(socket.socket(fileno=int(descriptor)), run)
