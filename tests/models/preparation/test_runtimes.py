"""`runtime = "auto"` takes OpenVINO where it is installed, gives the same and is clearly faster."""

from __future__ import annotations

import sys

import pytest

from models.preparation import openvino, runtimes
from models.preparation.race import Race
from models.preparation.replay import Replay
from models.preparation.variant import Needs
from tests.models.conftest import FlatNet, frozen
from tests.models.preparation.conftest import blocks, warm
from tests.models.preparation.test_openvino import JOBS, assert_equal_answers

needs_openvino = pytest.mark.skipif(
    not openvino.installed(), reason="OpenVINO is not installed (extra: openvino)"
)
FASTER = Race(torch_ms={1: 20.0}, other_ms={1: 10.0}, gain=2.0)
AS_FAST = Race(torch_ms={1: 10.0}, other_ms={1: 9.9}, gain=1.01)


@pytest.fixture
def measured(monkeypatch):
    """Say what is measured, plain passes first; networks are tried however small they are."""
    monkeypatch.setattr(runtimes, "SMALL_MS", 0.0)

    def say(*results: Race) -> None:
        left = iter(results)
        monkeypatch.setattr(runtimes, "race", lambda *_: next(left))

    return say


def served_by(model) -> list[bool]:
    """Whether OpenVINO runs plain passes, and those that read inner layers."""
    needs = Needs(), Needs(reads=frozenset(model.info.feature_layers))
    return [isinstance(model.module_for(each), Replay) for each in needs]


@needs_openvino
@pytest.mark.parametrize(
    ("results", "served"),
    [
        ((FASTER, FASTER), [True, True]),
        ((FASTER, AS_FAST), [True, False]),
        ((AS_FAST,), [False, False]),
    ],
)
def test_what_is_faster_serves_and_the_card_says_why(measured, on_torch, results, served):
    measured(*results)
    model = warm(blocks())
    assert served_by(model) == served
    steps = [step for step in model.info.card.preparation if "x torch (" in step]
    assert [str(result) in step for result, step in zip(results, steps, strict=True)]
    assert ["skipped" in step for step in steps] == [not result.won for result in results]
    assert any("MB of weights besides" in s for s in model.info.card.preparation) == any(served)
    assert_equal_answers(JOBS, on_torch, model)


@needs_openvino
def test_passes_are_really_measured(monkeypatch):
    monkeypatch.setattr(runtimes, "SMALL_MS", 0.0)
    model = warm(blocks())
    (step,) = [
        s for s in model.info.card.preparation if s.startswith("OpenVINO trunk in fp32:")
    ] or [s for s in model.info.card.preparation if s.startswith("OpenVINO trunk in fp32 skipped")]
    assert "ms at batch 1 / 8, torch" in step


@needs_openvino
def test_the_next_start_believes_what_was_measured(measured, tmp_path, monkeypatch):
    measured(FASTER, AS_FAST)
    first = warm(blocks(), proofs_dir=tmp_path)
    # Nothing is measured or converted again.
    measured()
    monkeypatch.delattr(openvino, "_convert")
    again = warm(blocks(), proofs_dir=tmp_path)
    assert served_by(again) == served_by(first) == [True, False]
    assert again.info.card.preparation == first.info.card.preparation


@needs_openvino
def test_where_torch_was_as_fast_the_next_start_does_not_import_it(measured, tmp_path, monkeypatch):
    measured(AS_FAST)
    warm(blocks(), proofs_dir=tmp_path)
    monkeypatch.delattr(openvino, "library")
    again = warm(blocks(), proofs_dir=tmp_path)
    assert served_by(again) == [False, False]
    assert any("not clearly faster, 1.01x torch" in s for s in again.info.card.preparation)


@pytest.mark.parametrize("runtime", ["auto", "torch"])
def test_without_the_package_nothing_is_tried(measured, monkeypatch, runtime):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delattr(openvino, "library")
    model = warm(blocks(), runtime=runtime)
    assert served_by(model) == [False, False]
    assert not any("openvino" in step.lower() for step in model.info.card.preparation)


@needs_openvino
def test_small_networks_are_not_worth_the_trial(monkeypatch):
    monkeypatch.delattr(openvino, "library")
    monkeypatch.setattr(runtimes, "SMALL_MS", 1e6)
    model = warm(blocks())
    assert "openvino skipped: a pass takes less than 1e+06 ms" in model.info.card.preparation


@needs_openvino
def test_heads_that_are_not_pooled_are_not_tried(measured, monkeypatch):
    monkeypatch.delattr(openvino, "library")
    model = warm(frozen(FlatNet()))
    (step,) = [s for s in model.info.card.preparation if s.startswith("openvino skipped")]
    assert "not pooling and one linear layer" in step


@needs_openvino
def test_another_precision_is_not_served_in_place_of_the_one_asked_for(
    measured, monkeypatch, every_precision
):
    real = runtimes.openvino_variants
    monkeypatch.setattr(runtimes, "openvino_variants", lambda *a, **k: (real(*a, **k)[0], "fp32"))
    card = warm(blocks(), precision="bf16").info.card
    assert card.precision == "bf16"
    assert "openvino skipped: OpenVINO has no bf16 on this CPU" in card.preparation
