"""A compiled backbone answers as the model does; without a compiler the model is served anyway."""

from __future__ import annotations

import logging

import pytest
import torch
import torch._inductor.config as inductor

from models.engine import Engine
from models.preparation.compiled import SIZES
from models.preparation.replay import Replay
from models.preparation.variant import Needs
from models.warm_model import WarmModel
from tests.models.conftest import FlatNet, OneModel, frozen
from tests.models.preparation.conftest import SIDE, blocks, warm
from tests.models.test_engine import MIXED, assert_same, finish, job


@pytest.fixture(autouse=True)
def cold_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def replays(model: WarmModel) -> list[Replay]:
    return [variant.module for variant in model.variants if isinstance(variant.module, Replay)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_model_answers_as_it_is(on_torch, monkeypatch):
    model = warm(blocks(), compile=True)
    assert "trunk by torch.compile" in model.info.card.preparation
    (replay,) = replays(model)
    assert model.module_for(Needs(reads=frozenset({"out"}))) is replay
    jobs = [*MIXED, *[job(str(i), seed=i) for i in range(max(SIZES))]]
    expected, found = (finish(Engine(OneModel(m)), jobs) for m in (on_torch, model))
    assert_same(found, expected, rtol=1e-3, atol=1e-4)
    # In parts of the compiled sizes, in either mode of autograd; nothing is compiled, or run
    # uncompiled, on the way.
    stance = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: stance("fail_on_recompile"))
    for size in (1, 3, 7):
        for mode in (torch.inference_mode, torch.enable_grad):
            with mode():
                pictures = torch.randn(size, 3, SIDE, SIDE)
                torch.testing.assert_close(
                    replay(pictures), model.module(pictures), rtol=1e-4, atol=1e-5
                )


def test_without_a_compiler_it_is_served_as_before(on_torch, monkeypatch, caplog):
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    with caplog.at_level(logging.WARNING, "heatlens.preparation"):
        model = warm(blocks(), compile=True)
    assert model.info.card.preparation[-1].startswith("torch.compile skipped: the compilation")
    assert "torch.compile does not take the model" in caplog.text
    assert not replays(model)
    expected, found = (finish(Engine(OneModel(m)), MIXED) for m in (on_torch, model))
    assert_same(found, expected)


def test_heads_that_cannot_be_replayed():
    model = warm(frozen(FlatNet()), compile=True)
    assert not replays(model)
    (reason,) = [s for s in model.info.card.preparation if s.startswith("torch.compile skipped")]
    assert "not pooling and one linear layer" in reason
