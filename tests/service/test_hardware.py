"""Devices found without torch."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from service.hardware import lower_thread_priority, resolve_devices, threads_per_device


@pytest.mark.parametrize(
    ("names", "cores", "gpus", "devices"),
    [
        (["auto"], 1, 0, ("cpu",)),
        (["auto"], 2, 0, ("cpu:0", "cpu:1")),
        (["auto"], 64, 0, ("cpu:0", "cpu:1", "cpu:2", "cpu:3")),
        (["auto"], 64, 2, ("cuda:0", "cuda:1")),
        (["cpu"], 8, 2, ("cpu",)),
        (["cuda:1", "cpu", "cuda:1"], 8, 2, ("cuda:1", "cpu")),
    ],
)
def test_devices(names, cores, gpus, devices):
    assert resolve_devices(names, cores=cores, count_gpus=lambda: gpus) == devices


def test_cpu_devices_share_the_cores():
    assert threads_per_device(("cpu:0", "cpu:1"), cores=9) == 4
    assert threads_per_device(("cpu:0", "cpu:1"), cores=1) == 1
    assert threads_per_device(("cuda:0",), cores=8) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_a_thread_gives_way_to_the_others():
    found = []

    def run() -> None:
        lower_thread_priority(2)
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [min(19, before + 2)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
