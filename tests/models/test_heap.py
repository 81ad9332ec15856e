"""The kept heap, in a process of its own since it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, sys
from models.heap import keep_heap
kept = sys.argv[1] == "kept" and keep_heap()
block = bytearray(48 << 20)
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    block = bytearray(48 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_large_blocks_are_not_faulted_in_again():
    faults = {}
    for case in ("plain", "kept"):
        done = subprocess.run(
            [sys.executable, "-c", PROBE, case], capture_output=True, text=True, check=True
        )
        kept, count = done.stdout.split()
        assert kept == str(case == "kept")
        faults[case] = int(count)
    assert faults["kept"] * 20 < faults["plain"]


RELEASE = """
import psutil
from models.heap import keep_heap, release_heap
keep_heap()
blocks = [bytearray(b"x" * (1 << 20)) for _ in range(200)]
kept = bytearray(1 << 20)
del blocks
before = psutil.Process().memory_info().rss
release_heap()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_kept_heap_can_be_released():
    done = subprocess.run(
        [sys.executable, "-c", RELEASE], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 150 << 20


START = """
import gc, weakref
from models.heap import end_start
gc.disable()
class Cycle: ...
def cycle():
    made = Cycle()
    made.itself = made
    return weakref.ref(made)
early = cycle()
end_start()
late = cycle()
gc.collect()
print(gc.isenabled(), early() is not None, late() is None)
"""


def test_what_was_made_at_the_start_is_left_out_of_later_collections():
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]


IMPORTS = """
import gc, sys, weakref
from models.heap import leave_imports_alone
class Cycle: ...
def cycle():
    made = Cycle()
    made.itself = made
    return weakref.ref(made)
gc.collect()
gc.disable()
if sys.argv[1] == "enabled":
    gc.enable()
early = cycle()
leave_imports_alone()
late = cycle()
gc.collect()
print(gc.isenabled(), early() is not None, late() is None)
"""


@pytest.mark.parametrize(
    ("case", "expected"),
    [("disabled", ["False", "True", "True"]), ("enabled", ["True", "False", "True"])],
)
def test_imports_are_left_out_of_collections_only_while_a_process_starts(case, expected):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, case], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == expected
