"""How many processor cores this process may really use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from importlib import metadata
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


# ---------------------------------------------------------------- devices


MAX_AUTO_CPU_DEVICES = 4


def resolve_devices(
    names: Sequence[str], *, cores: int, count_gpus: Callable[[], int] | None = None
) -> tuple[str, ...]:
    """Turn the configured names into devices, each once.

    `auto` is every GPU; without one, the cores as up to four CPU devices, for several workers of
    few threads serve more than one worker of many (see `benchmarks/README.md`).

    Args:
        names: `auto`, `cpu`, `cpu:N`, `cuda` or `cuda:N`.
        cores: that the service may use.
        count_gpus: finds the number of usable GPUs.
    """
    found: list[str] = []
    for name in names:
        if name != "auto":
            found.append(name)
            continue
        gpus = (count_gpus or count_cuda_devices)()
        if gpus:
            found += [f"cuda:{index}" for index in range(gpus)]
        else:
            workers = min(cores, MAX_AUTO_CPU_DEVICES)
            found += [f"cpu:{index}" for index in range(workers)] if workers > 1 else ["cpu"]
    return tuple(dict.fromkeys(found))


def threads_per_device(devices: Sequence[str], *, cores: int) -> int:
    """Torch threads of each CPU device: the cores, shared out."""
    cpus = sum(device.startswith("cpu") for device in devices)
    return max(1, cores // max(1, cpus))


def count_cuda_devices() -> int:
    """GPUs that a worker could use: what the driver shows (by `CUDA_VISIBLE_DEVICES`), if torch is built for it.

    The driver is asked for a number only; that opens no context and holds no device memory.
    """
    if metadata.version("torch").endswith("+cpu"):
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
