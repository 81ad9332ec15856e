"""Pixel and attention methods through the engine: maps, notes, and typed refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from models.engine import Engine
from models.extractor import Extractor
from models.methods import METHODS
from models.types import ClassRef, Failure, Outcome, Target
from tests.models.conftest import OneModel, frozen, warm_of
from tests.models.test_engine import assert_same, finish, job, normalised

OF_PIXELS = tuple(name for name, row in METHODS.items() if row.family == "pixels")
TARGETS = tuple(Target(cls=ClassRef(kind="index", value=value)) for value in (1, 4))
WORDS = {"integrated_gradients": "Completeness delta", "lrp": "Relevance"}


@pytest.fixture
def engine(pool_net) -> Engine:
    return Engine(OneModel(warm_of(pool_net, linear=pool_net.fc)))


def test_layers_targets_and_notes(engine):
    wanted = job(
        "a", methods=OF_PIXELS, layers=("body", "out"), targets=TARGETS, samples=2, steps=2
    )
    (found,) = finish(engine, [wanted])
    assert isinstance(found, Outcome), found
    by_method: dict[str, list] = {}
    for explanation in found.explanations:
        by_method.setdefault(explanation.method, []).append(explanation)
    assert tuple(by_method) == OF_PIXELS
    for name, explanations in by_method.items():
        layers = [""] if METHODS[name].of_input else ["body", "out"]
        places = [(e.target.class_id, e.layer) for e in explanations]
        assert places == [(cls, layer) for cls in (1, 4) for layer in layers]
        for explanation in explanations:
            assert explanation.map.shape == (8, 8)
            assert not explanation.degenerate
            assert [w.startswith(WORDS[name]) for w in explanation.warnings] == (
                [True] if name in WORDS else []
            )
    notes = [e.warnings[0] for e in by_method["lrp"]]
    assert notes[0] != notes[1]  # each map its own


def test_the_input_is_the_one_of_the_job(engine, pool_net):
    (found,) = finish(engine, [job("a", seed=9, methods=("saliency",), targets=TARGETS[:1])])
    x = normalised(job("a", seed=9)).requires_grad_()
    (gradient,) = torch.autograd.grad(pool_net(x)[0, 1], x)
    np.testing.assert_allclose(found.explanations[0].map, gradient[0].abs().amax(0), rtol=1e-4)


def test_company_changes_nothing(engine):
    batch = [
        job(f"{i}", seed=i, methods=OF_PIXELS, targets=TARGETS[: 1 + i], samples=3, steps=3)
        for i in range(2)
    ]
    for wanted, found in zip(batch, finish(engine, batch), strict=True):
        assert_same(found, finish(engine, [wanted])[0], rtol=1e-4)


def test_a_refusal_fails_its_own_job_only(pool_net):
    net = frozen(nn.Sequential(pool_net, nn.GELU()))
    engine = Engine(OneModel(warm_of(net, target_layer="0.out")))
    batch = [
        job(name, methods=(name,), layers=(), targets=TARGETS)
        for name in ("guided_backprop", "lrp", "legrad", "saliency")
    ]
    *refused, answered = finish(engine, batch)
    for failure in refused:
        assert isinstance(failure, Failure)
        assert failure.code == "method_not_applicable"
    assert isinstance(answered, Outcome)


def test_methods_of_the_input_leave_the_trunk_pass_without_a_graph(pool_net, monkeypatch):
    graphs = []
    original = Extractor.forward

    def forward(self, inputs, **options):
        output = original(self, inputs, **options)
        graphs.append(output.requires_grad)
        return output

    monkeypatch.setattr(Extractor, "forward", forward)
    engine = Engine(OneModel(warm_of(pool_net)))
    finish(engine, [job("a", methods=("saliency",))])
    finish(engine, [job("a", methods=("guided_gradcam",))])
    assert graphs == [False, True, True, True]
