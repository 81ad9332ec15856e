"""The processor cores, devices and descriptors of this machine, found without torch."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

MAX_AUTO_CPU_DEVICES = 4

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_UNLIMITED_CORES = 1 << 20
_MOST_DESCRIPTORS = 65_536


def available_cores(quota_file: Path = _CGROUP_QUOTA) -> int:
    """Cores that this process may use: by affinity mask or container quota, at least 1."""
    return max(1, min(_affinity_cores(), _quota_cores(quota_file)))


def resolve_devices(
    names: Sequence[str], *, cores: int, count_gpus: Callable[[], int] | None = None
) -> tuple[str, ...]:
    """Turn the configured names into devices, each once.

    `auto` is every GPU. Without a GPU it is up to four CPU devices that share the cores, because
    several workers with few threads serve more requests than one worker with many
    (see `benchmarks/README.md`).

    Args:
        names: `auto`, `cpu`, `cpu:N`, `cuda` or `cuda:N`.
        cores: number of cores that the service may use.
        count_gpus: counts the usable GPUs; None = `count_cuda_devices`.
    """
    count = count_gpus or count_cuda_devices
    groups = (_auto_devices(cores, count()) if name == "auto" else [name] for name in names)
    return tuple(dict.fromkeys(device for group in groups for device in group))


def threads_per_device(devices: Sequence[str], *, cores: int) -> int:
    """Torch threads of each CPU device when they share the cores."""
    cpu_devices = sum(device.startswith("cpu") for device in devices)
    return max(1, cores // max(1, cpu_devices))


def count_cuda_devices() -> int:
    """Number of GPUs that a worker could use; 0 if torch is built without CUDA.

    The driver respects `CUDA_VISIBLE_DEVICES`. Counting opens no context and takes no device
    memory.
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


def lower_thread_priority(by: int) -> None:
    """Let the other threads of this process have a core before this one; on Linux only."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + by)


def _affinity_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota_cores(quota_file: Path) -> int:
    """Whole cores of a `QUOTA PERIOD` file; a very large number if they are not limited."""
    try:
        quota, period = quota_file.read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return _UNLIMITED_CORES


def _auto_devices(cores: int, gpus: int) -> list[str]:
    if gpus:
        return [f"cuda:{index}" for index in range(gpus)]
    workers = min(cores, MAX_AUTO_CPU_DEVICES)
    return [f"cpu:{index}" for index in range(workers)] if workers > 1 else ["cpu"]


def raise_descriptor_limit() -> int:
    """Let this process open as many files as it may, and say how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
