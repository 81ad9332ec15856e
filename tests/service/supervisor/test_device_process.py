"""The detection of hangs by the predicted duration of an activity."""

from __future__ import annotations

import pytest

from service.devices.status import WorkerStatus
from service.settings import WorkerSettings
from service.supervisor.device_process import is_hung


@pytest.mark.parametrize(
    ("activity", "age_s", "predicted_s", "hung"),
    [
        ("idle", 1e6, 0.0, False),
        # The floor of 10 s.
        ("batch", 9.9, 0.01, False),
        ("batch", 10.1, 0.01, True),
        # Ten times the prediction.
        ("batch", 49.0, 5.0, False),
        ("batch", 51.0, 5.0, True),
        ("canary", 10.1, 0.01, True),
        ("load", 299.0, 0.0, False),
        ("load", 301.0, 0.0, True),
    ],
)
def test_hangs(activity, age_s, predicted_s, hung):
    status = WorkerStatus(activity=activity, since=1000.0, predicted_s=predicted_s)
    settings = WorkerSettings(hang_floor_s=10, hang_factor=10)
    assert hung == is_hung(status, now=1000 + age_s, settings=settings)
