"""How far long jobs say they have come, and what their maps show on the way."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from models.engine import Engine
from models.methods import METHODS
from models.methods.perturbation import KEPT, RandomMasks
from models.suspended import Suspended
from models.types import Job, Outcome, Progress, Target
from tests.models.conftest import OneModel
from tests.models.methods.test_all_methods import MAKERS, kinds_of, warmed
from tests.models.methods.test_all_methods import job as job_of
from tests.models.test_engine import index, job, normalised

LONG = [name for name, row in METHODS.items() if row.cost in ("passes", "many")]
TWO = (Target(cls=index(1)), Target(cls=index(4)))


def watch(engine: Engine, item: Job) -> tuple[list[Progress], list[int], Outcome]:
    """Run a job alone; its progress before each step, what the steps cost, and its outcome."""
    (answer,) = engine.run([item])
    seen, costs = [], []
    while isinstance(answer, Suspended):
        seen.append(answer.progress(maps=True))
        costs.append(answer.cost)
        (answer,) = engine.advance([answer])
    assert isinstance(answer, Outcome), answer
    return seen, costs, answer


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("kind", MAKERS)
def test_every_method_counts_its_steps(name, kind):
    if kind not in kinds_of(name):
        pytest.skip("the method does not explain this network")
    warm = warmed(kind)
    seen, costs, _ = watch(Engine(OneModel(warm)), job_of(warm, [name], 1, (0, 2)))
    if not costs:
        return
    assert {item.what for item in seen} == {name}
    assert [item.done for item in seen] == [sum(costs[:i]) for i in range(len(costs))]
    assert seen[-1].total == sum(costs)
    if name != "ablationcam":  # how many images its passes are worth, its first step finds out
        assert seen[0].total == pytest.approx(sum(costs), rel=0.25)


def test_the_total_covers_methods_and_measures_to_come(flat_engine):
    item = job(
        "all", methods=("gradcam", "rise", "occlusion", "smoothgrad"), targets=TWO, samples=10,
        steps=3, faithfulness=("deletion", "road"), layers=("body", "out"),
    )  # fmt: skip
    seen, costs, _ = watch(flat_engine, item)
    assert list(dict.fromkeys(p.what for p in seen)) == [
        "rise", "occlusion", "smoothgrad", "faithfulness",
    ]  # fmt: skip
    assert all(before.done < after.done for before, after in pairwise(seen))
    assert seen[0].total == pytest.approx(sum(costs), rel=0.1)
    assert seen[-1].total == sum(costs)


def test_maps_so_far_are_those_of_fewer_samples(flat_engine):
    """Copies are drawn one after the other: the first are the same, however many follow."""
    for name in ("smoothgrad", "vargrad"):
        seen, _, _ = watch(flat_engine, job("some", methods=(name,), samples=8, seed=3))
        assert seen[0].explanations == ()
        # A gradient counts as three images.
        shown = {p.done // 3: p.explanations for p in seen if p.explanations}
        few = next(count for count in shown if 1 < count < 8)
        _, _, whole = watch(flat_engine, job("few", methods=(name,), samples=few, seed=3))
        (found,), (expected,) = shown[few], whole.explanations
        np.testing.assert_allclose(found.map, expected.map, rtol=1e-5, atol=1e-8)
        assert (found.method, found.target) == (name, expected.target)


def test_maps_so_far_of_rise_are_the_mean_over_its_masks(flat_engine, flat_net):
    item = job("rise", methods=("rise",), samples=10, targets=TWO, seed=1)
    seen, _, outcome = watch(flat_engine, item)
    masks = RandomMasks.draw(10, (8, 8), torch.Generator().manual_seed(0))
    masks = masks.masks(0, 10, torch.device("cpu"))
    shares = flat_net(normalised(item) * masks[:, None]).softmax(1)
    for done, explanations in [(p.done, p.explanations) for p in seen[1:]] + [
        (10, outcome.explanations)
    ]:
        for target, found in zip((1, 4), explanations, strict=True):
            expected = shares[:done, target] @ masks[:done].flatten(1) / (done * KEPT)
            np.testing.assert_allclose(found.map.flatten(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "scorecam",
        "ss_cam",
        "is_cam",
        "occlusion",
        "integrated_gradients",
        "smooth_gradcam_plus_plus",
    ],
)
def test_maps_take_shape_step_by_step(name):
    warm = warmed("flat")
    item = job_of(warm, [name], 3, (0, 2))
    seen, _, outcome = watch(Engine(OneModel(warm)), item)
    shown = [p.explanations for p in seen if p.explanations]
    assert shown
    final = {e.target.class_id: e for e in outcome.explanations}
    for explanations in shown:
        for found in explanations:
            expected = final[found.target.class_id]
            assert found.map.shape == expected.map.shape
            assert (found.method, found.layer, found.signed) == (
                name, expected.layer, expected.signed,
            )  # fmt: skip
            assert np.isfinite(found.map).all()


def test_maps_of_a_fused_layer_are_not_shown(flat_engine):
    seen, _, _ = watch(
        flat_engine,
        job("fused", methods=("scorecam",), layers=("body", "out"), fuse="mean"),
    )
    assert len(seen) > 2
    assert not any(p.explanations for p in seen)
