"""Quarantined jobs are refused for a while, and are bounded in number."""

from __future__ import annotations

from service.devices.status import MAX_QUARANTINED
from service.supervisor.quarantine import Quarantine


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
