"""Measuring latencies on a clock that only the passes move."""

from __future__ import annotations

import logging

import pytest
import torch

from models import warmup
from models.warmup import best_batch, measure_latencies

CPU = torch.device("cpu")


class Clock:
    """Time that passes only while a batch runs."""

    def __init__(self, fixed_s: float, per_image_s: float) -> None:
        self.now = 100.0
        self.ran: list[int] = []
        self._fixed_s, self._per_image_s = fixed_s, per_image_s

    def run(self, size: int) -> None:
        slow_start = 0.3 if size not in self.ran else 0.0  # kernels are prepared for a new shape
        self.ran.append(size)
        self.now += self._fixed_s + self._per_image_s * size + slow_start

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch):
    def make(fixed_s: float, per_image_s: float) -> Clock:
        made = Clock(fixed_s, per_image_s)
        monkeypatch.setattr(warmup, "time", made)
        return made

    return make


def test_latencies_leave_the_first_pass_of_a_shape_out(clock):
    made = clock(0.002, 0.001)
    measured = measure_latencies(made.run, CPU, budget_s=10)
    assert measured == pytest.approx({1: 3, 2: 4, 4: 6, 8: 10, 16: 18})


def test_a_slow_model_is_measured_at_batch_one_and_no_further(clock):
    made = clock(0.0, 5.0)
    assert measure_latencies(made.run, CPU, budget_s=1.5) == pytest.approx({1: 5000})
    assert made.ran == [1, 1]


def test_the_budget_is_kept_but_for_a_pass_or_two(clock):
    made = clock(0.0, 0.05)
    start = made.now
    measured = measure_latencies(made.run, CPU, budget_s=1.5)
    assert made.now - start < 1.5 + 0.3 + 2 * 0.05 * max(measured)
    assert 1 in measured
    assert 16 not in measured


@pytest.mark.parametrize(
    ("latencies", "best"),
    [
        ({1: 10}, 1),
        ({1: 100, 2: 200, 4: 400}, 1),
        ({1: 10, 2: 20, 4: 38}, 4),  # what a batch costs beside its pass is shared by four
        ({1: 10, 2: 12, 4: 18, 8: 34, 16: 66}, 8),  # 8 comes within a tenth of 16
        ({1: 10, 2: 12, 4: 20, 8: 35, 16: 90}, 8),
    ],
)
def test_the_smallest_batch_near_the_best_rate(latencies, best):
    assert best_batch(latencies) == best


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device has what is missing here")
def test_what_a_device_cannot_make_is_left_out(caplog):
    """This build of torch knows neither streams nor graphs."""
    cuda = torch.device("cuda")
    with caplog.at_level(logging.ERROR, "heatlens.engine"):
        assert warmup._uploads(cuda) is None
        assert warmup._graphs(cuda, torch.float32) is None
    assert len(caplog.records) == 2
