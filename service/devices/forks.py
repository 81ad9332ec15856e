"""What the supervisor and the fork server tell each other, in one packet each.

The supervisor sends the arguments of a worker, a list of strings. For each of them there is one answer
`Forked`, in order, and later one `Exited`.
"""

from __future__ import annotations

import msgspec

LARGEST_MESSAGE = 65536
"""Bytes that a packet holds at most."""


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The process that was asked for runs."""

    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A process has exited; negative codes are the signals that ended it."""

    pid: int
    code: int


FromForkServer = Forked | Exited
