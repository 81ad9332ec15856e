"""Measures of faithfulness: hand-computed cases, definitions written as loops, and the engine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from msgspec import UNSET
from torch import nn

import models.faithfulness.pixel_removal
from models.faithfulness.imputation import impute
from models.faithfulness.measures import MEASURES, FaithfulnessTest
from models.faithfulness.pixel_removal import (
    Original,
    curve_counts,
    deleted,
    imputed,
    kept,
    pixel_ranks,
)
from models.targets import class_scores
from models.types import ClassScore, Explanation, Outcome, Target
from tests.models.test_engine import assert_same, finish, index, job


class SumNet(nn.Module):
    """The probability of class 0 is the sum of all pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = x.sum((1, 2, 3)).clamp(1e-12, 1 - 1e-12)
        return torch.stack([share.log(), (1 - share).log()], 1)


def explanation(values, cls: int = 0) -> Explanation:
    return Explanation(
        method="gradcam",
        layer="out",
        target=ClassScore(class_id=cls, score=0.0, probability=0.0),
        map=np.asarray(values, np.float32),
        signed=False,
        degenerate=False,
    )


def measuring(net, x, names, *, chunk=4, seed=0, curves=False) -> FaithfulnessTest:
    whole = class_scores(net(x), "single_label")[1][0]
    return FaithfulnessTest(
        names=names,
        inputs=x,
        whole=whole,
        chunk=chunk,
        seed=seed,
        curves=curves,
    )


def play(net, steps, sizes=None):
    """Run steps one by one; collects their sizes."""
    result = None
    while True:
        try:
            step = steps.send(result)
        except StopIteration as stop:
            return stop.value
        if sizes is not None:
            sizes.append(len(step.inputs))
        with torch.inference_mode():
            result = class_scores(net(step.inputs), "single_label")[step.probabilities]


@pytest.fixture
def on_grey(monkeypatch):
    """Insertion from a grey picture rather than a blurred one, as in the hand-computed cases."""
    monkeypatch.setattr(
        Original, "blurred", property(lambda original: torch.zeros_like(original.inputs))
    )


@pytest.mark.parametrize(
    ("pixels", "steps", "expected"),
    [([0.4, 0.3, 0.2, 0.1], 2, (0.4, 0.6)), ([0.3, 0.25, 0.2, 0.15, 0.1], 3, (0.41, 0.59))],
)
def test_curves_by_hand(pixels, steps, expected, on_grey, monkeypatch):
    """torch-cam's published cases: a classifier that sums its pixels, ranked by their worth."""
    monkeypatch.setattr(models.faithfulness.pixel_removal, "CURVE_STEPS", steps)
    x = torch.tensor(pixels).view(1, 1, 1, -1)
    test = measuring(SumNet(), x, ["deletion", "insertion"])
    found = play(SumNet(), test.steps(explanation(x[0, 0])))
    assert found["deletion"].value == pytest.approx(expected[0], abs=1e-6)
    assert found["insertion"].value == pytest.approx(expected[1], abs=1e-6)


def test_the_curves_by_hand(on_grey, monkeypatch):
    monkeypatch.setattr(models.faithfulness.pixel_removal, "CURVE_STEPS", 2)
    x = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 1, 1, 4)
    names = ["average_drop", "increase", "deletion", "insertion"]
    test = measuring(SumNet(), x, names, curves=True)
    found = play(SumNet(), test.steps(explanation(x[0, 0])))
    assert found["average_drop"].curve is found["increase"].curve is UNSET
    lost, back = found["deletion"].curve, found["insertion"].curve
    assert lost.share == back.share == (0.0, 0.5, 1.0)
    assert lost.value == pytest.approx((1.0, 0.3, 0.0), abs=1e-6)
    assert back.value == pytest.approx((0.0, 0.7, 1.0), abs=1e-6)
    assert (lost.random[0], lost.random[-1]) == pytest.approx((1.0, 0.0), abs=1e-6)


def test_measures_are_made_from_the_curves(flat_net, images):
    test = measuring(flat_net, images[1:2], ["deletion", "insertion", "road"], curves=True)
    found = play(flat_net, test.steps(explanation(torch.rand(4, 4), cls=2)))
    assert found["road"].curve.share == (0.2, 0.4, 0.6, 0.8)
    for measured in found.values():
        curve = measured.curve
        for value, points in ((measured.value, curve.value), (measured.random, curve.random)):
            assert len(points) == len(curve.share)
            road = curve is found["road"].curve
            expected = np.mean(points) if road else np.trapezoid(points, curve.share)
            assert value == pytest.approx(expected, abs=1e-9)
    plain = measuring(flat_net, images[1:2], ["deletion"])
    assert play(flat_net, plain.steps(explanation(np.ones((2, 2)))))["deletion"].curve is UNSET


def test_drop_and_increase_by_hand():
    x = torch.tensor([0.4, 0.3, 0.2, -0.1]).view(1, 1, 1, 4)
    test = measuring(SumNet(), x, ["average_drop", "increase"])
    found = play(SumNet(), test.steps(explanation([[2.0, 0.0, 0.0, 0.0]])))
    assert found["average_drop"].value == pytest.approx((0.8 - 0.4) / 0.8)
    assert found["increase"].value == 0.0
    found = play(SumNet(), test.steps(explanation([[3.0, 3.0, 3.0, -5.0]])))
    assert found["average_drop"].value == 0.0
    assert found["increase"].value == 1.0
    # Evidence against the class is no reason to keep a pixel: the mask is (1, 1/3, 0, 0).
    found = play(SumNet(), test.steps(explanation([[3.0, 1.0, 0.0, -1.0]])))
    assert found["average_drop"].value == pytest.approx((0.8 - 0.5) / 0.8)


def test_random_maps_by_hand(on_grey, monkeypatch):
    """The random map is one fixed order of the pixels: its measures are those of that order."""
    monkeypatch.setattr(models.faithfulness.pixel_removal, "CURVE_STEPS", 4)
    x = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 1, 1, 4)
    seen = set()
    for seed in range(8):
        test = measuring(SumNet(), x, ["deletion"], seed=seed)
        found = play(SumNet(), test.steps(explanation(x[0, 0])))["deletion"]
        order = torch.rand(1, 4, generator=torch.Generator().manual_seed(seed))[0].argsort(
            descending=True
        )
        curve = [1.0, *(1 - x.flatten()[order].cumsum(0)).tolist()]
        area = sum((a + b) / 8 for a, b in itertools.pairwise(curve))
        assert found.random == pytest.approx(area, abs=1e-5)
        assert found.value == pytest.approx(0.375)
        seen.add(round(found.random, 4))
    assert len(seen) > 3


def test_ties_are_ranked_in_reading_order():
    original = Original(torch.randn(3, 6, 7), 0)
    assert pixel_ranks(original, torch.zeros(2, 2)).flatten().tolist() == list(range(42))
    values = torch.zeros(6, 7)
    values[4, 3] = 1.0
    ranks = pixel_ranks(original, values)
    assert ranks[4, 3] == 0
    assert ranks.flatten().sort().values.tolist() == list(range(42))
    # A map that is zero almost everywhere still removes as many pixels as it should.
    gone = (deleted(original, values).make(0, 42) == 0).all(1).sum((1, 2))
    assert gone.tolist() == curve_counts(42)[1:].tolist()


@pytest.mark.parametrize("pixels", [1, 3, 56, 57, 224 * 224])
def test_curves_begin_with_nothing_and_end_with_everything(pixels):
    counts = curve_counts(pixels)
    assert (counts[0], counts[-1]) == (0, pixels)
    assert (counts.diff() > 0).all()


def test_blur_is_the_gaussian_written_out():
    x = torch.randn(3, 9, 14, generator=torch.Generator().manual_seed(0))
    found = Original(x, 0).blurred.double().numpy()
    at = np.arange(-5, 6)
    kernel = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / 50)
    kernel /= kernel.sum()
    padded = np.pad(x.double().numpy(), ((0, 0), (5, 5), (5, 5)))
    for i, j in itertools.product(range(9), range(14)):
        expected = (padded[:, i : i + 11, j : j + 11] * kernel).sum((1, 2))
        np.testing.assert_allclose(found[:, i, j], expected, atol=1e-6)


def by_definition(name, net, x, ranks, mask, cls) -> float:
    """Each measure in float64, one picture at a time."""

    def p(picture):
        return float(net(picture[None]).softmax(1)[0, cls])

    whole, pixels = p(x), ranks.numel()
    if name == "average_drop":
        return max(0.0, whole - p(x * mask)) / whole
    if name == "increase":
        return float(p(x * mask) > whole)
    if name == "road":
        gains = []
        for share in (0.2, 0.4, 0.6, 0.8):
            n = round(share * pixels)
            first, last = (
                p(impute(x.float(), gone[None])[0].double())
                for gone in (ranks < n, ranks >= pixels - n)
            )
            gains.append((last - first) / 2)
        return float(np.mean(gains))
    base = torch.zeros_like(x) if name == "deletion" else Original(x.float(), 0).blurred.double()
    counts = [round(i * pixels / 56) for i in range(57)]
    chosen = [ranks < n for n in counts]
    curve = [
        p(torch.where(c, base, x) if name == "deletion" else torch.where(c, x, base))
        for c in chosen
    ]
    return sum(
        (curve[i] + curve[i + 1]) / 2 * (counts[i + 1] - counts[i]) / pixels for i in range(56)
    )


@pytest.mark.parametrize("name", MEASURES)
def test_measures_by_definition(name, flat_net, images, monkeypatch):
    monkeypatch.setattr(models.faithfulness.pixel_removal, "NOISE", 0.0)
    x = images[1:2]
    values = torch.randn(4, 4, generator=torch.Generator().manual_seed(4)).relu()
    test = measuring(flat_net, x, [name], seed=6)
    found = play(flat_net, test.steps(explanation(values, cls=3)))[name]
    original, net = Original(x[0], 6), flat_net.double()
    for map_, value in ((values, found.value), (original.random_map((4, 4)), found.random)):
        mask = original.enlarged(map_)
        mask = ((mask - mask.min()) / (mask.max() - mask.min())).double()
        ranks = pixel_ranks(original, map_)
        expected = by_definition(name, net, x[0].double(), ranks, mask, 3)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_steps_are_bounded_and_shared(flat_net, images):
    """No step beyond the chunk; the random maps' passes are made once for all maps of a size."""
    test = measuring(flat_net, images[:1], list(MEASURES), chunk=6)
    one = 1 + 56 + 56 + 8
    counts = []
    for values in (torch.rand(4, 4), torch.rand(4, 4), torch.rand(8, 8)):
        sizes = []
        play(flat_net, test.steps(explanation(values, cls=1)), sizes)
        assert max(sizes) <= 6
        counts.append(sum(sizes))
    assert counts == [2 * one, one, 2 * one]


def test_chunks_do_not_change_what_is_measured(flat_net, images):
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for chunk in (1, 3, 7, 200):
        test = measuring(flat_net, images[:1], list(MEASURES), chunk=chunk, seed=2)
        results.append(play(flat_net, test.steps(explanation(values, cls=2))))
    for other in results[1:]:
        assert_same(list(other.values()), list(results[0].values()))


def test_imputed_pictures_are_noisy_where_pixels_are_gone():
    original = Original(torch.ones(3, 20, 20), 5)
    pictures = imputed(original, torch.rand(5, 5, generator=torch.Generator().manual_seed(0)))
    made = torch.cat([pictures.make(i, i + 1) for i in range(8)])
    changed = (made != 1).all(1)
    assert changed.sum((1, 2)).tolist() == [80, 160, 240, 320] * 2
    noise = (made - 1)[changed[:, None].expand_as(made)]
    assert noise.std() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(made[0], made[4])


def test_degenerate_maps_have_measures_too(flat_net, images):
    test = measuring(flat_net, images[:1], list(MEASURES))
    found = play(flat_net, test.steps(explanation(np.zeros((4, 4)), cls=0)))
    assert all(np.isfinite([f.value, f.random]).all() for f in found.values())
    assert (kept(Original(images[0], 0), torch.full((2, 2), 3.0)).make(0, 1) == 0).all()


def test_a_map_of_what_counts_beats_a_random_one():
    class Corner(nn.Module):
        def forward(self, x):
            bright = x[:, :, :14, :14].mean((1, 2, 3))
            return torch.stack([5 * bright, torch.zeros_like(bright)], 1)

    values = torch.zeros(4, 4)
    values[:2, :2] = 1.0
    x = torch.ones(1, 3, 56, 56) + 0.3 * torch.randn(
        1, 3, 56, 56, generator=torch.Generator().manual_seed(0)
    )
    x[:, :, 14:] = x[:, :, :, 14:] = 0.0
    test = measuring(Corner(), x, list(MEASURES), chunk=16)
    found = play(Corner(), test.steps(explanation(values)))
    assert found["deletion"].value < found["deletion"].random - 0.05
    assert found["insertion"].value > found["insertion"].random
    assert found["road"].value > found["road"].random + 0.05
    assert found["average_drop"].value < found["average_drop"].random


EVERY = tuple(MEASURES)
MEASURED = [
    job("plain", seed=1),
    job("all", seed=2, methods=("gradcam", "occlusion"), faithfulness=EVERY, steps=3,
        targets=(Target(cls=index(1)), Target(cls=index(4)))),
    job("fused", seed=3, layers=("body", "out"), fuse="mean", faithfulness=("deletion", "road")),
]  # fmt: skip


@pytest.mark.parametrize("which", ["pool_engine", "flat_engine"])
def test_the_engine_answers_with_measures(which, request):
    engine = request.getfixturevalue(which)
    together = finish(engine, MEASURED)
    for item, found in zip(MEASURED, together, strict=True):
        assert isinstance(found, Outcome), found
        for explained in found.explanations:
            assert tuple(explained.faithfulness) == item.options.faithfulness
        alone = finish(engine, [item])[0]
        for explained, expected in zip(found.explanations, alone.explanations, strict=True):
            measured, wanted = explained.faithfulness, expected.faithfulness
            assert_same(list(measured.values()), list(wanted.values()), atol=1e-5)
    assert len(together[1].explanations) == 4
    gradcam = together[1].explanations
    assert gradcam[0].faithfulness["deletion"] != gradcam[1].faithfulness["deletion"]


def test_the_engine_measures_the_map_it_answers_with(flat_engine, flat_net):
    item = job("one", seed=2, faithfulness=("deletion",), targets=(Target(cls=index(1)),))
    explained = finish(flat_engine, [item])[0].explanations[0]
    x = (torch.from_numpy(item.input).permute(2, 0, 1)[None].float() - 127.5) / 64.0
    alone = play(flat_net, measuring(flat_net, x, ["deletion"]).steps(explained))
    assert explained.faithfulness["deletion"].value == pytest.approx(
        alone["deletion"].value, abs=1e-5
    )
