"""Memory of a process: whether glibc keeps what is freed, and when Python collects garbage."""

from __future__ import annotations

import ctypes
import gc
import platform

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2
_NEVER = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20


def keep_heap() -> bool:
    """Tell glibc to keep freed memory instead of returning it to the kernel.

    By default each large tensor is mapped, faulted in page by page and unmapped again, at every
    layer of every pass. All three settings go together: changing one alone switches off glibc's own
    adaptation. Call it before the first large allocation; peak memory grows by about a tenth.

    Returns:
        Whether it took effect: only glibc has these settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: _TOP_PAD_BYTES}
    taken = [mallopt(parameter, value) for parameter, value in wanted.items()]
    return all(taken)


def leave_imports_alone() -> None:
    """Look for garbage no more among what was made by now, in a process that starts without.

    Imported modules are a million objects, half a second for each full collection.
    """
    if not gc.isenabled():
        gc.freeze()


def end_start() -> None:
    """Look for garbage from now on, but never again among what was made by now.

    A process that starts with `gc.disable()` imports faster by a sixth. Modules and models stay for
    good; without them a full collection, which halts all threads, is short.
    """
    if not gc.isenabled():
        gc.freeze()
        # Answers leave no cycles behind. What is looked at is what is half made: the more of it at a
        # time, the longer all threads are halted, for a tenth of a second by 50,000 objects.
        gc.set_threshold(20_000, 20, 100)
        gc.enable()


def release_heap() -> None:
    """Collect garbage, and return what is free then to the kernel, kept or not."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return what is free at the moment to the kernel, without halting other threads for long."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
