"""Images are read only after their copy, and all parts of a batch set out before the first runs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.cuda.staging import CarefulUploads, CopyStream, Ready, indices, stage
from models.engine import Engine
from models.hooks import HookStack
from models.preparation.variant import Variant
from tests.models.conftest import OneModel, warm_of
from tests.models.test_engine import assert_same, finish, job

PICTURES = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(3)]


class SlowUploads:
    """A device whose copies arrive only when they are waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def start(self, host: torch.Tensor) -> Ready:
        self.log.append(f"start {len(host)}")
        arrived = torch.zeros_like(host)

        def ready() -> torch.Tensor:
            self.log.append(f"wait {len(host)}")
            return arrived.copy_(host)

        return ready


def test_pictures_are_stacked():
    for uploads in (None, SlowUploads([])):
        np.testing.assert_array_equal(stage(PICTURES, uploads)().numpy(), np.stack(PICTURES))


def test_all_parts_of_a_batch_set_out_before_the_first_runs(pool_net):
    """The variant serves predictions only, so the batch runs as two parts."""
    log: list[str] = []
    variant = Variant(
        module=copy.deepcopy(pool_net),
        step="a copy",
        readable=frozenset(),
        rewritable=frozenset(),
        differentiable=True,
    )
    plain = warm_of(pool_net, linear=pool_net.fc)
    warm = replace(plain, variants=(variant,), uploads=SlowUploads(log))
    batch = [job("a", seed=1), job("b", "predict", seed=2), job("c", seed=3)]
    with HookStack() as hooks:
        for module in (pool_net, variant.module):
            hooks.forward(module, lambda *_: log.append("pass"))
        found = finish(Engine(OneModel(warm)), batch)
    assert log == ["start 2", "start 1", "wait 2", "pass", "wait 1", "pass"]
    for a, b in zip(found, finish(Engine(OneModel(plain)), batch), strict=True):
        assert_same(a, b)


class FailingUploads(SlowUploads):
    """A device on which one part of an upload fails, from the second upload on."""

    def __init__(self, part: str) -> None:
        super().__init__([])
        self.part = part
        self.uploads = 0

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.uploads += 1
        self._fail_in("memory")
        return super().memory(shape, dtype)

    def start(self, host: torch.Tensor) -> Ready:
        self._fail_in("start")
        ready = super().start(host)

        def arrived() -> torch.Tensor:
            self._fail_in("ready")
            return ready()

        return arrived

    def _fail_in(self, part: str) -> None:
        if part == self.part and self.uploads > 1:
            raise RuntimeError("resource already mapped")


@pytest.mark.parametrize("part", ["memory", "start", "ready"])
def test_an_upload_that_fails_takes_no_batch_along_and_is_not_tried_again(part, caplog):
    failing = FailingUploads(part)
    uploads = CarefulUploads(failing)
    with caplog.at_level(logging.ERROR, "heatlens.engine"):
        for _ in range(4):
            np.testing.assert_array_equal(stage(PICTURES, uploads)().numpy(), np.stack(PICTURES))
    assert failing.uploads == 2
    assert len(caplog.records) == 1


def test_batches_on_their_way_when_an_upload_fails_arrive():
    uploads = CarefulUploads(FailingUploads("ready"))
    staged = [stage(PICTURES[::step], uploads) for step in (1, -1, 1)]
    for ready, step in zip(staged, (1, -1, 1), strict=True):
        np.testing.assert_array_equal(ready().numpy(), np.stack(PICTURES[::step]))


def test_a_model_whose_uploads_fail_answers_as_before(pool_net):
    plain = warm_of(pool_net, linear=pool_net.fc)
    engine = Engine(OneModel(replace(plain, uploads=CarefulUploads(FailingUploads("start")))))
    for seed in range(3):
        batch = [job("a", seed=seed), job("b", "predict", seed=seed + 10)]
        for a, b in zip(finish(engine, batch), finish(Engine(OneModel(plain)), batch), strict=True):
            assert_same(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is page-locked memory")
def test_without_page_locked_memory_a_device_is_waited_for(monkeypatch):
    """A tensor for CUDA, on a host that has none."""
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    with pytest.warns(UserWarning, match="page-locked"):
        assert indices([1, 2], torch.device("cuda")).tolist() == [1, 2]


@pytest.mark.gpu
def test_a_gpu_waits_for_its_pictures():
    device = torch.device("cuda")
    uploads = CopyStream(device)
    torch.cuda._sleep(50_000_000)
    first, second = stage(PICTURES, uploads), stage(PICTURES[::-1], uploads)
    for ready, pictures in ((second, PICTURES[::-1]), (first, PICTURES)):
        on_device = ready()
        assert on_device.device.type == "cuda"
        np.testing.assert_array_equal(on_device.cpu().numpy(), np.stack(pictures))


@pytest.mark.gpu
def test_memory_is_not_overwritten_while_it_is_copied():
    """Many batches in a row through page-locked memory that is given out again."""
    uploads = CopyStream(torch.device("cuda"))
    batches = [np.full((512, 512, 3), i, np.uint8) for i in range(64)]
    staged = [stage([batch] * 4, uploads) for batch in batches]
    sums = [ready().sum(dtype=torch.int64) for ready in staged]
    assert [int(s) for s in sums] == [int(b.sum(dtype=np.int64)) * 4 for b in batches]
