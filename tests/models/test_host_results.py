"""A batch's results cross to the host in one transfer; on the CPU nothing is copied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models import host_results
from models.cuda.recorder import waiting_forbidden
from models.cuda.staging import indices
from models.engine import Engine
from models.head import HeadProbe
from models.host_results import fetch
from models.types import Target
from tests.models.conftest import FlatNet, OneModel, PoolNet, frozen, warm_of
from tests.models.cuda.conftest import on_gpu
from tests.models.test_engine import FREE, MIXED, assert_same, finish, index, job, rank

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "maps": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "one for all": torch.randn(2, 1, 3).expand(2, 4, 3),
    "ranks": torch.tensor([[2**40, -1]]),
    "number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 3),
    "halves": torch.randn(5).half(),
}


@pytest.fixture
def transfers(monkeypatch) -> list[int]:
    """Bytes of each transfer from a device that is not the host, though it computes like it."""
    made: list[int] = []

    def to_host(packed: torch.Tensor) -> np.ndarray:
        made.append(packed.numel())
        return packed.clone().numpy()

    monkeypatch.setattr(host_results, "_on_host", lambda tensor: False)
    monkeypatch.setattr(host_results, "_to_host", to_host)
    return made


def assert_fetched() -> None:
    found = fetch(TENSORS)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.numpy().dtype
        assert found[name].flags.aligned
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_all_dtypes_and_shapes_cross_in_one_transfer(transfers):
    assert_fetched()
    assert transfers == [sum(t.numel() * t.element_size() for t in TENSORS.values())]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is page-locked memory")
def test_tensors_cross_without_page_locked_memory(monkeypatch):
    monkeypatch.setattr(host_results, "_on_host", lambda tensor: False)
    with pytest.warns(UserWarning, match="page-locked"):
        assert_fetched()


def test_nothing_is_copied_on_the_host():
    found = fetch(TENSORS)
    for name, tensor in TENSORS.items():
        assert np.shares_memory(found[name], tensor.numpy()) or name == "nothing"


def jobs_of(count: int, **options: object) -> list:
    return [job(f"{i}", seed=i, **options) for i in range(count)]


def company() -> list:
    """Jobs that share a pass but not their methods, targets and layers."""
    return [
        job("many", seed=1, methods=FREE, targets=(Target(cls=rank(2)), Target(cls=index(0)))),
        job("one", seed=2, methods=("layercam",), layers=("body", "out")),
        job("contrast", seed=3, targets=(Target(cls=rank(2), against=(rank(1), index(0))),)),
    ]


@pytest.mark.parametrize("which", ["pool_engine", "flat_engine"])
@pytest.mark.parametrize(
    "batch",
    [
        jobs_of(1),
        jobs_of(7),
        jobs_of(3, methods=FREE[1:], targets=tuple(Target(cls=rank(r)) for r in range(1, 6))),
        jobs_of(2, layers=("body", "out"), statistics=True),
        jobs_of(2, layers=("body", "out"), fuse="max", targets=(Target(cls=index(1)),)),
        jobs_of(2, targets=(Target(cls=rank(2), against=(rank(1), index(0))),)),
        [m for m in MIXED if not m.options.interventions],
        [job("features", "features", layers=("body", "out"), kinds=("output", "grad_output"))],
    ],
    ids=["1", "7", "methods and targets", "layers", "fused", "contrast", "mixed", "features"],
)
def test_one_transfer_whatever_is_asked_and_one_for_statistics(
    which, batch, transfers, monkeypatch, request
):
    engine = request.getfixturevalue(which)
    summaries: list[torch.Tensor] = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: (summaries.append(t), cpu(t))[1])
    finish(engine, batch)
    described = any(j.options.statistics or j.operation == "features" for j in batch)
    assert (len(transfers), len(summaries)) == (1, described)


def test_the_host_is_told_the_same(flat_net, monkeypatch, request):
    engine = Engine(OneModel(warm_of(flat_net)))
    plain = finish(engine, MIXED)
    request.getfixturevalue("transfers")
    for found, expected in zip(finish(engine, MIXED), plain, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("which", ["pool_engine", "flat_engine"])
def test_nothing_else_is_read_from_the_device_while_the_pass_runs(which, monkeypatch, request):
    """Reading one number is enough to wait for a device: no door for that is needed.

    The one exception is the check of the closed form, which decides how the batch goes on.
    """
    engine = request.getfixturevalue(which)
    checks: list[bool] = []
    reproduces = HeadProbe.reproduces

    def check(*args: Any, **options: Any) -> bool:
        with monkeypatch.context() as opened:
            for name, door in doors.items():
                opened.setattr(torch.Tensor, name, door)
            checks.append(reproduces(*args, **options))
        return checks[-1]

    batch = [job("predict", "predict"), *company()]
    expected = finish(engine, batch)
    arrays: list[dict] = []

    def fetched(tensors: dict) -> dict:
        with monkeypatch.context() as opened:
            for name, door in doors.items():
                opened.setattr(torch.Tensor, name, door)
            arrays.append(fetch(tensors))
        return arrays[-1]

    def closed(*_: object) -> None:
        raise AssertionError("read from the device")

    names = ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
    doors = {name: getattr(torch.Tensor, name) for name in names}
    monkeypatch.setattr("models.host_results.fetch", fetched)
    monkeypatch.setattr(HeadProbe, "reproduces", check)
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, closed)
    found = finish(engine, batch)
    monkeypatch.undo()
    assert len(arrays) == 1
    assert checks == [True] * (which == "pool_engine")
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def test_indices_keep_their_shape():
    assert indices([[3, 1]], torch.device("cpu")).tolist() == [[3, 1]]


@pytest.mark.gpu
def test_tensors_of_a_gpu_cross():
    far = {name: tensor.cuda() for name, tensor in TENSORS.items()}
    found = fetch(far | {"here": TENSORS["maps"]})
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
    np.testing.assert_array_equal(found["here"], TENSORS["maps"].numpy())
    assert indices([[3, 1]], torch.device("cuda")).tolist() == [[3, 1]]


@pytest.mark.gpu
@pytest.mark.parametrize("net", [PoolNet, FlatNet])
def test_a_gpu_is_waited_for_only_when_its_answers_are_fetched(net, monkeypatch):
    """Torch itself fails at every other wait that it knows of but the check of the closed form."""
    # `waiting_forbidden` would refuse the check.
    monkeypatch.setattr(HeadProbe, "reproduces", lambda *_, **__: True)
    made = frozen(net())
    plain = warm_of(made, linear=made.fc if net is PoolNet else None)
    warm = replace(on_gpu(plain, torch.device("cuda", 0)), graphs=None)
    engine = Engine(OneModel(warm))
    batch = [job("predict", "predict"), *company()]
    finish(engine, batch)
    with waiting_forbidden():
        found = finish(engine, batch)
    for a, b in zip(found, finish(Engine(OneModel(plain)), batch), strict=True):
        assert_same(a, b, rtol=5e-3, atol=5e-3)
