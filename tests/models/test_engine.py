"""Batches of mixed jobs: each answer is the one the job gets alone, and the right one."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, structs

from models.engine import Engine
from models.hooks import HookStack
from models.methods import METHODS, implementation
from models.steps import Forward
from models.suspended import Suspended
from models.types import (
    ClassRef,
    Failure,
    Intervention,
    Job,
    JobOptions,
    Outcome,
    Target,
)
from tests.models.conftest import FlatNet, OneModel, PoolNet, frozen, warm_of
from tests.models.test_extractor import hooks_left

FREE = tuple(
    name
    for name, row in METHODS.items()
    if row.cost in ("pass", "head") and row.family == "gradient"
)


def index(value: int) -> ClassRef:
    return ClassRef(kind="index", value=value)


def rank(value: int) -> ClassRef:
    return ClassRef(kind="rank", value=value)


def job(
    name: str, operation: str = "explain", *, seed: int = 0, side: int = 8, **options: Any
) -> Job:
    if operation == "explain":
        options = {"methods": ("gradcam",), "layers": ("out",), **options}
    picture = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Job(
        id=name,
        operation=operation,
        model="tiny",
        version="1",
        input=picture,
        options=JobOptions(**options),
    )


def normalised(item: Job) -> torch.Tensor:
    return (torch.from_numpy(item.input).permute(2, 0, 1)[None].float() - 127.5) / 64.0


def finish(engine: Engine, jobs: list[Job]) -> list[Outcome | Failure]:
    """Run a batch to its end, steps included."""
    answers = engine.run(jobs)
    while pending := [a for a in answers if isinstance(a, Suspended)]:
        advanced = iter(engine.advance(pending))
        answers = [next(advanced) if isinstance(a, Suspended) else a for a in answers]
    return answers


def assert_same(found: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Equal structures, floats and arrays within tolerance."""
    assert type(found) is type(expected)
    if isinstance(found, np.ndarray):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=rtol, abs=atol)
    elif isinstance(found, msgspec.Struct):
        for field in found.__struct_fields__:
            assert_same(getattr(found, field), getattr(expected, field), rtol=rtol, atol=atol)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert_same(value, expected[key], rtol=rtol, atol=atol)
    elif isinstance(found, (tuple, list)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b, rtol=rtol, atol=atol)
    else:
        assert found == expected


MIXED = [
    job("predict", "predict", seed=1, top_k=2, targets=()),
    job("one", seed=2),
    job("many", seed=3, methods=FREE[1:], targets=(Target(cls=rank(1)), Target(cls=index(4)))),
    job("contrast", seed=4, targets=(Target(cls=rank(2), against=(rank(1), index(0))),)),
    job("deep", seed=5, layers=("body", "out"), statistics=True),
    job("fused", seed=5, layers=("body", "out"), fuse="max"),
    job("features", "features", seed=6, layers=("body", "out"), kinds=("output", "input")),
    job("gradients", "features", seed=7, layers=("out",), kinds=("grad_output",),
        targets=(Target(cls=index(1)), Target(cls=index(2)))),
    job("changed", seed=8, interventions=(Intervention(layer="out", channels=(0, 2), op="zero"),)),
]  # fmt: skip


@pytest.mark.parametrize("which", ["pool_engine", "flat_engine"])
def test_a_mixed_batch_equals_each_job_alone(which, request):
    engine = request.getfixturevalue(which)
    together = finish(engine, MIXED)
    for item, found in zip(MIXED, together, strict=True):
        assert isinstance(found, Outcome), found
        assert_same(found, finish(engine, [item])[0])


def test_a_grid_goes_to_the_job_that_asked_for_it(pool_engine):
    jobs = [job("with", "features", layers=("out",), grid=True), job("without", statistics=True)]
    with_grid, without = finish(pool_engine, jobs)
    assert with_grid.statistics[0].grid is not None
    assert without.statistics[0].grid is None


@given(order=st.permutations(range(len(MIXED))), size=st.integers(1, len(MIXED)))
def test_any_order_and_any_company(order, size):
    torch.manual_seed(2)
    engine = Engine(OneModel(warm_of(frozen(FlatNet()))))
    batch = [MIXED[i] for i in order[:size]]
    answers = {a.id: a for a in finish(engine, batch)}
    alone = finish(engine, [batch[-1]])[0]
    assert_same(answers[batch[-1].id], alone)


def test_closed_form_equals_autograd(pool_net):
    """The head's weights give the maps that gradients give, for plain and contrastive targets."""
    closed = Engine(OneModel(warm_of(pool_net, linear=pool_net.fc)))
    differentiated = Engine(OneModel(warm_of(pool_net)))
    targets = (Target(cls=rank(1)), Target(cls=index(3), against=(index(0), rank(2))))
    batch = [job(f"{i}", seed=i, methods=FREE, targets=targets, statistics=True) for i in range(3)]
    for a, b in zip(finish(closed, batch), finish(differentiated, batch), strict=True):
        assert_same(a, b, rtol=1e-4)


def test_one_trunk_pass_for_everything(flat_net, flat_engine):
    calls: list[int] = []
    targets = tuple(Target(cls=index(i)) for i in range(5))
    batch = [
        job(f"{i}", seed=i, methods=FREE[1:], targets=targets, layers=("body", "out"))
        for i in range(4)
    ]
    with HookStack() as hooks:
        hooks.forward(flat_net.stem, lambda *_: calls.append(1))
        finish(flat_engine, batch)
    assert calls == [1]


def test_predictions_are_softmax_of_the_logits(flat_net, flat_engine):
    item = job("a", "predict", seed=3, top_k=5)
    found = finish(flat_engine, [item])[0]
    logits = flat_net(normalised(item))[0].double()
    order = logits.argsort(descending=True)
    assert [p.class_id for p in found.predictions] == order.tolist()
    np.testing.assert_allclose([p.score for p in found.predictions], logits[order], rtol=1e-5)
    np.testing.assert_allclose(
        [p.probability for p in found.predictions], logits.softmax(0)[order], rtol=1e-5
    )


def test_gradcam_of_ranks_and_indices_equals_autograd_by_hand(flat_net, flat_engine):
    item = job("a", seed=4, targets=(Target(cls=rank(2)), Target(cls=index(1))))
    found = finish(flat_engine, [item])[0]
    leaf = flat_net.out(flat_net.body(flat_net.act(flat_net.stem(normalised(item))))).detach()
    leaf.requires_grad_()
    logits = flat_net.fc2(flat_net.fc1(leaf.flatten(1)).tanh())[0]
    for explanation, cls in zip(found.explanations, [logits.argsort()[-2], 1], strict=True):
        (gradient,) = torch.autograd.grad(logits[cls], leaf, retain_graph=True)
        expected = (gradient.mean((2, 3), keepdim=True) * leaf).sum(1).relu()[0].detach()
        np.testing.assert_allclose(explanation.map, expected, rtol=1e-4, atol=1e-6)
        assert explanation.target.class_id == int(cls)
        assert explanation.target.score == pytest.approx(logits[cls].item(), rel=1e-5)


def test_explanations_come_in_the_order_method_target_layer(flat_engine):
    item = job(
        "a",
        methods=("layercam", "gradcam"),
        targets=(Target(cls=index(4)), Target(cls=index(2))),
        layers=("body", "out"),
    )
    found = finish(flat_engine, [item])[0]
    assert [(e.method, e.target.class_id, e.layer) for e in found.explanations] == [
        (m, t, layer) for m in ("layercam", "gradcam") for t in (4, 2) for layer in ("body", "out")
    ]


def test_a_signed_layer_is_warned_of(flat_engine):
    item = job("a", methods=("gradcam", "xgradcam"), layers=("body",))
    plain, warned = finish(flat_engine, [item])[0].explanations
    assert plain.warnings == ()
    assert "negative" in warned.warnings[0]


def test_a_constant_map_is_degenerate(pool_net):
    pool_net.body.bias.fill_(-1e6)
    engine = Engine(OneModel(warm_of(pool_net, linear=pool_net.fc)))
    found = finish(engine, [job("a")])[0].explanations[0]
    assert found.degenerate
    assert not found.map.any()


def test_a_bad_neighbour_is_refused_and_the_others_answered(flat_engine):
    bad = job("bad", side=9)
    wrong = job("wrong", interventions=(Intervention(layer="out", channels=(99,), op="zero"),))
    nowhere = job("nowhere", interventions=(Intervention(layer="x", channels=(0,), op="zero"),))
    found = finish(flat_engine, [bad, job("good", seed=1), wrong, nowhere])
    assert [type(f) for f in found] == [Failure, Outcome, Failure, Failure]
    assert {f.code for f in found if isinstance(f, Failure)} == {"invalid_option", "unknown_layer"}
    assert_same(found[1], finish(flat_engine, [job("good", seed=1)])[0])


def test_scores_that_are_not_finite_fail_that_picture_only(flat_net):
    flat_net.fc2.bias[0] = float("nan")
    found = finish(Engine(OneModel(warm_of(flat_net))), [job("a")])[0]
    assert isinstance(found, Failure)
    assert found.code == "internal"


@pytest.mark.parametrize("op", ["zero", "mean", "scale"])
def test_interventions_answer_as_if_the_maps_were_changed(op, flat_net, flat_engine):
    change = Intervention(layer="out", channels=(1, 4), op=op, value=0.5)
    item = job("a", "predict", seed=5, top_k=5, interventions=(change,))
    found = finish(flat_engine, [item, job("b", "predict", seed=5, top_k=5)])
    maps = flat_net.out(flat_net.body(flat_net.act(flat_net.stem(normalised(item))))).clone()
    for channel in (1, 4):
        kept = {"zero": 0.0, "scale": maps[0, channel] * 0.5, "mean": maps[0, channel].mean()}[op]
        maps[0, channel] = kept
    logits = flat_net.fc2(flat_net.fc1(maps.flatten(1)).tanh())[0]
    scores = {p.class_id: p.score for p in found[0].predictions}
    np.testing.assert_allclose([scores[i] for i in range(5)], logits.tolist(), rtol=1e-4, atol=1e-6)
    assert found[1].predictions != found[0].predictions


def test_all_kinds_of_features_on_a_model_that_works_in_place(flat_net, flat_engine):
    """`body` is followed by an in-place ReLU, which full backward hooks cannot meet."""
    kinds = ("output", "input", "grad_output", "grad_input")
    item = job(
        "a", "features", seed=6, layers=("body",), kinds=kinds, targets=(Target(cls=index(2)),)
    )
    found = finish(flat_engine, [item])[0].statistics
    assert [s.kind for s in found] == list(kinds)
    assert [s.shape for s in found] == [(6, 4, 4), (4, 8, 8), (6, 4, 4), (4, 8, 8)]
    into = flat_net.act(flat_net.stem(normalised(item))).detach().requires_grad_()
    out = flat_net.body(into)
    logits = flat_net.fc2(flat_net.fc1(out.relu().flatten(1)).tanh())
    grads = torch.autograd.grad(logits[0, 2], [out, into])
    for statistic, tensor in zip(found, [out, into, *grads], strict=True):
        assert statistic.l2 == pytest.approx(tensor.norm().item(), rel=1e-4)
        assert statistic.mean == pytest.approx(tensor.mean().item(), rel=1e-3, abs=1e-6)
    assert [s.target for s in found] == [UNSET, UNSET, 2, 2]


def test_statistics_carry_the_weights_of_the_method(flat_net, flat_engine):
    item = job("a", seed=7, statistics=True, targets=(Target(cls=index(0)),))
    found = finish(flat_engine, [item])[0].statistics[0]
    leaf = flat_net.out(flat_net.body(flat_net.act(flat_net.stem(normalised(item))))).detach()
    leaf.requires_grad_()
    logits = flat_net.fc2(flat_net.fc1(leaf.flatten(1)).tanh())
    (gradient,) = torch.autograd.grad(logits[0, 0], leaf)
    for channel in found.top_channels:
        assert channel.weight == pytest.approx(float(gradient[0, channel.index].mean()), rel=1e-4)


def test_a_single_logit_has_two_classes():
    torch.manual_seed(0)
    net = frozen(PoolNet(classes=1))
    engine = Engine(OneModel(warm_of(net, classes=2, task="binary")))
    item = job(
        "a", seed=1, targets=(Target(cls=index(0)), Target(cls=index(1))), methods=("hirescam",)
    )
    found = finish(engine, [item])[0]
    logit = float(net(normalised(item))[0, 0])
    by_class = {p.class_id: p for p in found.predictions}
    assert by_class[1].score == pytest.approx(logit, rel=1e-5)
    assert by_class[0].score == pytest.approx(-logit, rel=1e-5)
    assert by_class[0].probability + by_class[1].probability == pytest.approx(1)
    negative, positive = (e.map for e in found.explanations)
    assert not (negative * positive).any(), "what speaks for one class speaks against the other"


def test_multi_label_probabilities_are_sigmoids(flat_net):
    found = finish(
        Engine(OneModel(warm_of(flat_net, task="multi_label"))), [job("a", "predict", top_k=5)]
    )[0]
    for p in found.predictions:
        assert p.probability == pytest.approx(1 / (1 + np.exp(-p.score)), rel=1e-5)


def test_the_model_keeps_no_trace(flat_net, flat_engine):
    finish(flat_engine, MIXED)
    assert hooks_left(flat_net) == 0
    assert all(p.grad is None for p in flat_net.parameters())
    assert not any(m.training for m in flat_net.modules())


def test_a_step_that_fails_ends_its_own_job(flat_engine, flat_net, monkeypatch):
    def broken(subject):
        yield Forward(subject.inputs)
        raise RuntimeError("the method's own fault")

    module = sys.modules[implementation("eigencam").__module__]
    monkeypatch.setattr(module, "eigencam", broken)
    monkeypatch.setitem(METHODS, "eigencam", structs.replace(METHODS["eigencam"], cost="many"))
    found = finish(flat_engine, [job("a", methods=("eigencam",)), job("b", seed=1)])
    assert isinstance(found[0], Failure)
    assert found[0].code == "internal"
    assert "own fault" not in found[0].message
    assert isinstance(found[1], Outcome)
    assert hooks_left(flat_net) == 0


def test_normalised_values_are_taken_as_they_are(pool_engine):
    """In one batch with pixels, every kind of job; the values are those that pixels become."""
    values = [
        structs.replace(item, id=f"{item.id} of values", input=normalised(item)[0].numpy())
        for item in MIXED
    ]
    found = finish(pool_engine, [*MIXED, *values])
    for pixels, same in zip(found[: len(MIXED)], found[len(MIXED) :], strict=True):
        assert_same(structs.replace(same, id=pixels.id), pixels)


def test_values_are_not_mistaken_for_pixels(pool_engine):
    item = job("wrong")
    for wrong in (item.input.astype(np.float32), item.input.transpose(2, 0, 1)):
        (found,) = pool_engine.run([structs.replace(item, input=wrong)])
        assert (found.code, found.message[:27]) == ("invalid_option", "The model takes images of 8")
