"""How many processor cores this process may really use."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores(quota_file: Path = _CGROUP_QUOTA) -> int:
    """Cores by affinity mask and by container quota, whichever is less; at least 1."""
    return max(1, min(_affinity(), _quota(quota_file)))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(quota_file: Path) -> int:
    """Whole cores of a `QUOTA PERIOD` file; a very large number when there is no limit."""
    try:
        quota, period = quota_file.read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return 1 << 20
