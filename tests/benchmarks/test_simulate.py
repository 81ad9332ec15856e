"""The simulation of many devices: nothing is lost, and the service's batcher keeps its promises."""

from __future__ import annotations

import pytest

from benchmarks.policies import Heatlens, policies
from benchmarks.simulate import (
    CURVES,
    DEADLINE_PASSES,
    Device,
    Simulation,
    arrivals,
    compare,
    requests,
)

CPU = CURVES["fp32"]


@pytest.mark.parametrize("kind", ["poisson", "bursty", "diurnal"])
def test_arrivals_come_at_the_mean_rate(kind):
    times = list(arrivals(kind, 50.0, 5000))
    assert times == sorted(times)
    assert 5000 / times[-1] == pytest.approx(50.0, rel=0.15)


@pytest.mark.parametrize("number", [1, 8])
def test_half_the_load_is_answered_in_time(number):
    found = compare(CPU, number, "poisson", 0.5, count=600)["Heatlens"]
    assert found.good > 0.98


def test_above_the_capacity_answers_stay_in_time_and_the_rest_is_refused():
    found = compare(CPU, 4, "poisson", 2.0, count=4000)
    ours = found.pop("Heatlens")
    assert ours.p99_ms < 1.1 * DEADLINE_PASSES * CPU[1]
    assert ours.refused > 0.3
    assert all(ours.good > other.good for other in found.values())


def test_the_line_refuses_about_as_many_as_the_devices_would():
    ours = compare(CPU, 4, "poisson", 1.5, count=3000, has_line=True)["Heatlens"]
    alone = compare(CPU, 4, "poisson", 1.5, count=3000)["Heatlens"]
    assert ours.good == pytest.approx(alone.good, abs=0.05)
    assert ours.refused == pytest.approx(alone.refused, abs=0.05)
    assert ours.p99_ms < 1.1 * DEADLINE_PASSES * CPU[1]


def test_long_jobs_are_answered_below_the_capacity():
    """One device, where each of them has to wait for the one before."""
    found = compare(CPU, 1, "poisson", 0.9, count=3000)["Heatlens"]
    assert found.good > 0.98
    assert found.long > 0.9


def test_above_the_capacity_both_kinds_get_their_share():
    """Devices with a long job still get their part of the short ones."""
    found = compare(CPU, 8, "poisson", 1.5, count=6000)["Heatlens"]
    assert found.good > 0.75
    assert found.long > 0.75


def test_a_death_takes_no_job_along():
    jobs = requests(arrivals("poisson", 100.0, 300), deadline_s=60.0, unit_ms=7.0)
    devices = [Device(Heatlens(CPU, 4, 60.0)) for _ in range(2)]
    outcome = Simulation(devices).run(jobs, deaths=[(0.5, 0, 1.0)])
    assert devices[0].deaths == 1
    assert outcome.refused == 0
    assert all(job.ended < float("inf") for job in jobs)


def test_other_policies_answer_what_arrives_slowly():
    for name, make in policies(CPU, 1.0).items():
        jobs = requests(arrivals("poisson", 2.0, 50), deadline_s=10.0, unit_ms=7.0)
        assert Simulation([Device(make())]).run(jobs).good == 1.0, name
