"""The benchmark's arithmetic, on a clock that the cases themselves move."""

from __future__ import annotations

import pytest

from benchmarks.timing import compare, machine_line, rounds_of


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def test_rounds_are_interleaved_and_fill_their_budget() -> None:
    clock = Clock()
    cases = {"plain": clock.case("plain", 0.01), "explain": clock.case("explain", 0.03)}
    rounds = list(rounds_of(cases, rounds=3, budget_s=0.06, clock=clock))
    assert [list(seconds) for seconds in rounds] == [
        ["plain", "explain"],
        ["explain", "plain"],
        ["plain", "explain"],
    ]
    warm_up = 4
    assert clock.calls[warm_up : warm_up + 8] == ["plain"] * 6 + ["explain"] * 2
    for seconds in rounds:
        assert seconds == pytest.approx({"plain": 0.01, "explain": 0.03})


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is ten times slower in one round moves no ratio."""
    rounds = [{"plain": 1.0, "explain": 1.5}, {"plain": 10.0, "explain": 15.0}]
    result = compare(rounds, baseline="plain")
    assert result["explain"].ratio == pytest.approx(1.5)
    assert result["explain"].low == result["explain"].high == pytest.approx(1.5)
    assert result["plain"].ratio == 1
    assert result["plain"].seconds == pytest.approx(5.5)


def test_one_round_is_enough() -> None:
    assert compare([{"a": 2.0, "b": 3.0}], baseline="a")["b"].ratio == pytest.approx(1.5)


def test_machine_line_names_versions() -> None:
    assert "numpy " in machine_line("numpy")
