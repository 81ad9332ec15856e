"""Two forms of a network are timed in turns, whatever else the machine does."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.preparation import race as races
from models.preparation.race import Race, race


class Clock:
    """Time that passes only where a pass takes it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(races, "time", clock)
    return clock


def passes(clock: Clock, ms_per_image: float, *, slowdown=lambda: 1.0):
    """A pass that takes a time for each image, and more while the machine is busy."""
    sizes: list[int] = []

    def run(images: torch.Tensor) -> None:
        sizes.append(len(images))
        clock.now += len(images) * ms_per_image / 1000 * slowdown()

    return run, sizes


IMAGES = torch.zeros(3, 3, 8, 8)


@pytest.mark.parametrize(
    ("theirs", "won"), [(10.0, False), (9.8, False), (9.0, True), (12.0, False)]
)
def test_only_what_is_clearly_faster_wins(clock, theirs, won):
    result = race(passes(clock, 10.0)[0], passes(clock, theirs)[0], IMAGES)
    assert result.won is won
    assert result.gain == pytest.approx(10.0 / theirs)
    assert result.torch_ms == pytest.approx({1: 10.0, 8: 80.0})


def test_work_of_others_that_comes_and_goes_changes_nothing(clock):
    # Some passes, now of one and now of the other, take five times as long.
    ours = passes(clock, 10.0, slowdown=itertools.cycle([1, 1, 5, 1]).__next__)
    theirs = passes(clock, 8.0, slowdown=itertools.cycle([1, 1, 1, 1, 5]).__next__)
    assert race(ours[0], theirs[0], IMAGES).gain == pytest.approx(1.25)


def test_batches_that_would_take_too_long_are_left_out(clock):
    ours, theirs = passes(clock, 60.0), passes(clock, 60.0)
    assert set(race(ours[0], theirs[0], IMAGES).torch_ms) == {1, 4}
    began = clock.now
    assert set(race(*(passes(clock, 900.0)[0] for _ in "ab"), IMAGES).torch_ms) == {1}
    assert clock.now - began < 10


def test_the_card_says_what_was_measured():
    result = Race(torch_ms={1: 11.64, 8: 80.0}, other_ms={1: 10.31, 8: 71.0}, gain=1.128)
    assert str(result) == "1.13x torch (10.3 / 71.0 ms at batch 1 / 8, torch 11.6 / 80.0)"
