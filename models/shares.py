"""How long jobs and others share a device, and what that means for their waits."""

from __future__ import annotations

LONG_SHARE = 0.25
"""Share of a device that long jobs have while others wait as well."""


def shared_wait(own: float, other: float, *, long: bool) -> float:
    """Time until the work of a class is done on a device that the other class shares.

    That has its share of the device meanwhile, or less if it has less work.
    """
    return min(own / (LONG_SHARE if long else 1 - LONG_SHARE), own + other)
