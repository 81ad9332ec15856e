"""Ends a process with its parent, and names it. Imports almost nothing, so that decoders start quickly."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent exits; elsewhere than on Linux, check once.

    Args:
        parent_pid: the expected parent; if it has exited already, this process exits at once.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl failed")
    # The parent may have exited before the kernel was told.
    if os.getppid() != parent_pid:
        os._exit(1)


def name_process(name: str) -> None:
    """Name this process in what `ps -e` and `top` show: 15 characters, on Linux only.

    Args:
        name: a fork has the command line of the process that it is a copy of.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
