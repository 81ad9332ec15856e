"""The benchmark of CUDA devices says what it needs, and measures what it says it does."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda
from benchmarks.timing import rounds_of
from tests.models.conftest import PoolNet, frozen, warm_of
from tests.models.cuda.conftest import rerun
from tests.models.cuda.test_staging import SlowUploads


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        cuda.main()


def test_each_switch_is_on_in_half_of_the_cases(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(cuda, "CopyStream", lambda device: SlowUploads(log))
    monkeypatch.setattr(cuda, "GraphRecorder", lambda device: rerun)
    net = frozen(PoolNet())
    warm = warm_of(net, linear=net.fc)
    found = {
        on: (v.uploads is not None, v.graphs is not None) for on, v in cuda.variants(warm, batch=6)
    }
    assert found == {
        "neither": (False, False),
        "graphs": (False, True),
        "staging": (True, False),
        "staging + graphs": (True, True),
    }
    cases = cuda.cases_of(warm, batch=6)
    (seconds,) = rounds_of(cases, rounds=1, budget_s=0.001)
    assert len(seconds) == 2 + 2 * 4
    assert "start 6" in log
