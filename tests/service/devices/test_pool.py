"""What readiness and metrics say of a device follows from what its worker wrote last."""

from __future__ import annotations

import time

import pytest

from service.devices.pool import device_status
from service.devices.status import DeviceState, WorkerStatus


@pytest.mark.parametrize(
    ("last_pass_s", "state"), [(None, "starting"), (1.0, "ready"), (31.0, "lost")]
)
def test_a_device_is_ready_while_its_last_pass_is_recent(last_pass_s, state):
    last_pass = 0.0 if last_pass_s is None else time.monotonic() - last_pass_s
    worker = WorkerStatus(ready=True, last_pass=last_pass)
    running = DeviceState(device="cpu", incarnation=1, state="running")
    assert device_status(running, worker, ready_within_s=30.0).state == state
