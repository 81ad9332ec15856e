"""Keeping the heap: large tensors stay mapped from one pass to the next."""

from __future__ import annotations

import ctypes
import platform

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2
_NEVER = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20


def keep_heap() -> bool:
    """Tell glibc to keep freed memory instead of giving it back to the kernel.

    By default each large tensor is mapped, faulted in page by page and unmapped again, at every
    layer of every pass. All three settings go together: touching one alone switches off glibc's own
    adaptation. Call it before the first large allocation; peak memory grows by a tenth or so.

    Returns:
        Whether it took effect: only glibc has these settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: _TOP_PAD_BYTES}
    taken = [mallopt(parameter, value) for parameter, value in wanted.items()]
    return all(taken)
