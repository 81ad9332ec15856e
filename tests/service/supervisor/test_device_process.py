"""Hangs are detected by the predicted duration; quarantined jobs are refused for a while."""

from __future__ import annotations

import pytest

from service.devices.status import MAX_QUARANTINED, WorkerStatus
from service.settings import WorkerSettings
from service.supervisor.device_process import Quarantine, is_hung


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


def test_a_quarantine_ends():
    quarantine = Quarantine(60)
    quarantine.add("a", 0.0)
    quarantine.add("b", 10.0)
    assert quarantine.digests(59.0) == ("a", "b")
    assert quarantine.digests(60.0) == ("b",)
    assert quarantine.digests(70.0) == ()


def test_a_job_that_ends_workers_again_stays_longer():
    quarantine = Quarantine(60)
    for digest, now in (("a", 0.0), ("b", 10.0), ("a", 50.0)):
        quarantine.add(digest, now)
    assert quarantine.digests(100.0) == ("a",)


def test_the_oldest_make_room():
    quarantine = Quarantine(60)
    for number in range(MAX_QUARANTINED + 5):
        quarantine.add(str(number), 0.0)
    kept = quarantine.digests(1.0)
    assert (len(kept), kept[0]) == (MAX_QUARANTINED, "5")
