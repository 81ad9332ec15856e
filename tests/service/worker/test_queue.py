"""The latency model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.worker.queue import LatencyModel


def test_latency_between_and_beyond_what_was_measured():
    model = LatencyModel({1: 10, 4: 16, 8: 30})
    assert [model.predict_ms(n) for n in (1, 2, 3, 4, 6, 8, 16)] == [10, 12, 14, 16, 23, 30, 60]
    assert LatencyModel().predict_ms(3) > 0


@given(st.integers(1, 16), st.floats(0.1, 1e4))
def test_latency_follows_what_is_observed(size, duration_ms):
    model = LatencyModel({1: 10, 8: 30})
    before = model.predict_ms(size)
    model.observe(size, duration_ms)
    # A pass that was held up for a second says little of the next one.
    trusted = min(8 * before, max(before / 8, duration_ms))
    assert model.predict_ms(size) == pytest.approx(before + 0.2 * (trusted - before))
    for _ in range(60):
        model.observe(size, duration_ms)
    assert model.predict_ms(size) == pytest.approx(duration_ms, rel=0.01, abs=0.05)


def test_neighbours_make_batches_slow_and_models_no_dearer():
    model = LatencyModel({1: 10, 8: 30})
    for duration_ms in (70, 40, 11, 55, 90, 30, 12, 65, 48, 80) * 4:
        model.observe(1, duration_ms)
    assert model.predict_ms(8) > 90
    assert model.undisturbed_ms == {1: pytest.approx(12), 8: pytest.approx(36)}
    for _ in range(32):
        model.observe(8, 60)
    assert model.undisturbed_ms == {1: 20, 8: 60}
    for _ in range(3):
        # Batches that failed at once.
        model.observe(8, 0.1)
    assert model.undisturbed_ms == {1: 20, 8: 60}


def test_latency_of_an_unmeasured_model_is_its_first_observation():
    model = LatencyModel()
    model.observe(2, 7.0)
    assert model.predict_ms(2) == 7.0
