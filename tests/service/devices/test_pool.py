"""What is said of a device follows from what its worker wrote last; jobs are told apart."""

from __future__ import annotations

import time

import numpy as np
import pytest
from msgspec import structs

from models.types import Job, JobOptions
from service.devices.pool import device_status
from service.devices.socket_pool import digest_of
from service.devices.status import DeviceState, WorkerStatus


@pytest.mark.parametrize(
    ("last_pass_s", "state"), [(None, "starting"), (1.0, "ready"), (31.0, "lost")]
)
def test_a_device_is_ready_while_its_last_pass_is_recent(last_pass_s, state):
    last_pass = 0.0 if last_pass_s is None else time.monotonic() - last_pass_s
    worker = WorkerStatus(ready=True, last_pass=last_pass)
    running = DeviceState(device="cpu", incarnation=1, state="running")
    assert device_status(running, worker, ready_within_s=30.0).state == state


def test_digest_depends_on_input_areas_model_and_options():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    job = Job(
        id="1", operation="explain", model="m", version="1", input=pixels, options=JobOptions()
    )
    other_pixel = pixels.copy()
    other_pixel[0, 0, 0] = 9
    others = [
        structs.replace(job, version="2"),
        structs.replace(job, input=other_pixel),
        structs.replace(job, areas=np.ones((1, 4, 4), np.uint8)),
        structs.replace(job, options=JobOptions(methods=("rise",))),
    ]
    assert len({digest_of(other) for other in [job, *others]}) == 5
    same = structs.replace(job, id="2", input=np.asfortranarray(pixels))
    assert digest_of(same) == digest_of(job)
    assert len(digest_of(job)) == 32
