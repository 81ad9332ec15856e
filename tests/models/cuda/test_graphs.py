"""Recordings are made late, checked once, bounded in number, and never trusted after a failure."""

from __future__ import annotations

import logging

import pytest
import torch

from models.cuda.graphs import Graphs, Work
from models.cuda.recorder import GraphRecorder
from tests.models.cuda.conftest import rerun


def double(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return 2 * values, values.long()


def numbers(*values: float) -> tuple[torch.Tensor]:
    return (torch.tensor(values)[:, None],)


def graphs_of(record=rerun, **options) -> Graphs:
    return Graphs(record, **{"dtype": torch.float32, "patience": 0} | options)


def values(outputs: tuple[torch.Tensor, ...] | None) -> list[float]:
    assert outputs is not None
    return outputs[0].flatten().tolist()


def test_a_replay_gives_what_the_call_gives():
    graphs = graphs_of()
    for given in ((1.0, 2.0, 3.0), (4.0,), (5.0, 6.0)):
        outputs = graphs.run("double", double, numbers(*given), rows=4)
        assert values(outputs) == [2 * value for value in given]
    assert len(graphs) == 1


def test_work_is_recorded_once_for_its_rows():
    shapes: list[tuple[int, ...]] = []

    def capture(work: Work) -> Work:
        shapes.append(tuple(work()[0].shape))
        return work

    graphs = graphs_of(capture)
    for _ in range(3):
        graphs.run("double", double, numbers(1.0, 2.0), rows=4)
    assert shapes == [(4, 1)]


def test_a_key_is_recorded_when_it_comes_again_and_again():
    graphs = graphs_of(patience=2)
    found = [graphs.run("double", double, numbers(1.0), rows=1) for _ in range(4)]
    assert [outputs is None for outputs in found] == [True, True, False, False]


def test_the_least_recently_used_is_dropped():
    recorded: list[float] = []

    def capture(work: Work) -> Work:
        recorded.append(1)
        return work

    graphs = graphs_of(capture, most=2)
    for key in ("a", "b", "a", "c", "a", "b"):
        assert values(graphs.run(key, double, numbers(1.0), rows=1)) == [2.0]
        assert len(graphs) <= 2
    assert len(recorded) == 4  # a, b, c, and b again, which had made room for c


def test_keys_that_do_not_come_again_soon_are_never_recorded():
    graphs = graphs_of(most=2, patience=1)
    for _ in range(5):
        for key in ("a", "b", "c"):
            assert graphs.run(key, double, numbers(1.0), rows=1) is None


def test_what_cannot_be_recorded_is_not_tried_again(caplog):
    tried: list[int] = []

    def capture(work: Work) -> Work:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = graphs_of(capture)
    with caplog.at_level(logging.ERROR, "heatlens.engine"):
        assert [graphs.run("a", double, numbers(1.0), rows=1) for _ in range(3)] == [None] * 3
    assert tried == [1]
    assert len(caplog.records) == 1
    assert values(graphs_of().run("a", double, numbers(1.0), rows=1)) == [2.0]


def test_a_replay_that_does_not_read_its_inputs_is_found_out(caplog):
    def capture(work: Work) -> Work:
        recorded = work()
        return lambda: recorded

    graphs = graphs_of(capture)
    with caplog.at_level(logging.ERROR, "heatlens.engine"):
        assert [graphs.run("a", double, numbers(1.0), rows=1) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert len(graphs) == 0


def test_a_replay_that_fails_is_not_tried_again(caplog):
    """Its passes run plainly from then on; other recordings are replayed as before."""
    broken: list[str] = []

    def capture(work: Work) -> Work:
        def replay() -> tuple[torch.Tensor, ...]:
            if broken:
                broken.append("tried")
                raise RuntimeError("a graph could not be launched")
            return work()

        return replay

    graphs = graphs_of(capture)
    assert values(graphs.run("a", double, numbers(1.0), rows=1)) == [2.0]
    broken.append("from now on")
    with caplog.at_level(logging.ERROR, "heatlens.engine"):
        assert [graphs.run("a", double, numbers(1.0), rows=1) for _ in range(3)] == [None] * 3
    assert broken == ["from now on", "tried"]
    assert len(caplog.records) == 1
    broken.clear()
    assert values(graphs.run("b", double, numbers(2.0), rows=1)) == [4.0]


@pytest.mark.parametrize(
    ("dtype", "error", "kept"),
    [
        (torch.float32, 1e-4, True),
        (torch.float32, 1e-2, False),
        (torch.bfloat16, 1e-2, True),
        (torch.bfloat16, 0.1, False),
        (torch.float16, 1e-2, False),
    ],
)
def test_the_tolerance_goes_by_the_precision(dtype, error, kept):
    def capture(work: Work) -> Work:
        return lambda: tuple(output + error * output.abs().amax() for output in work())

    graphs = graphs_of(capture, dtype=dtype)
    assert (graphs.run("a", double, numbers(1.0, 8.0), rows=2) is not None) == kept


def test_values_that_are_not_finite_agree_with_themselves():
    given = numbers(float("nan"), float("inf"), 1.0)
    found = values(graphs_of().run("a", lambda v: (v + 1,), given, rows=4))
    assert found[1:] == [float("inf"), 2.0]


@pytest.mark.gpu
def test_a_gpu_replays(cuda):
    graphs = graphs_of(GraphRecorder(cuda))
    for given in ((1.0, 2.0, 3.0), (4.0,), (5.0, 6.0)):
        for key, rows in (("narrow", 4), ("wide", 1024)):
            inputs = tuple(tensor.to(cuda) for tensor in numbers(*given))
            outputs = graphs.run(key, double, inputs, rows=rows)
            assert values(outputs) == [2 * value for value in given]
    assert len(graphs) == 2


def synchronise(given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.cuda.synchronize()
    return (2 * given,)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "bad", [lambda v: (v * v.sum().item(),), synchronise], ids=["read", "wait"]
)
def test_work_that_waits_is_refused_and_the_gpu_goes_on(bad, cuda):
    graphs = graphs_of(GraphRecorder(cuda))
    inputs = tuple(tensor.to(cuda) for tensor in numbers(1.0, 2.0))
    before = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    assert values(graphs.run("first", double, inputs, rows=2)) == [2.0, 4.0]
    assert graphs.run("bad", bad, inputs, rows=2) is None
    assert (torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()) == before
    torch.cuda.empty_cache()  # fails while torch believes that it is recording
    for key in ("first", "second"):
        assert values(graphs.run(key, double, inputs, rows=2)) == [2.0, 4.0]
