"""Segmentation: scores over regions are those of plain loops, maps those of pytorch-grad-cam."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from torch import Tensor, nn

from models.compat import define_missing_operators
from models.engine import Engine
from models.methods import METHODS
from models.readout import RegionScores
from models.targets import ranked
from models.types import ClassRef, Outcome, Target
from tests.models.conftest import OneModel, frozen, warm_of
from tests.models.test_engine import assert_same, finish, index, job, normalised, rank

define_missing_operators()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_grad_cam as peer
    from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget

CLASSES = 5


class SegNet(nn.Module):
    """Scores of every pixel, made at half the resolution and enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.out = nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(6, 6, 3, padding=1)
        self.score = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.score(self.mix(self.out(self.body(self.stem(x).relu()))).relu())
        return nn.functional.interpolate(maps, scale_factor=2.0, mode="bilinear")


@pytest.fixture
def net() -> SegNet:
    torch.manual_seed(4)
    return frozen(SegNet())


@pytest.fixture
def engine(net) -> Engine:
    return Engine(OneModel(warm_of(net, task="segmentation")))


def area(rows: slice, columns: slice) -> np.ndarray:
    drawn = np.zeros((8, 8), np.uint8)
    drawn[rows, columns] = 1
    return drawn


TOP_LEFT, RIGHT = area(slice(0, 3), slice(0, 4)), area(slice(1, 8), slice(5, 8))


def in_area(ref: ClassRef, number: int) -> ClassRef:
    return structs.replace(ref, value=ref.value + number * CLASSES)


@given(seed=st.integers(0, 999), side=st.integers(2, 6), areas=st.integers(0, 3))
def test_scores_are_means_over_the_pixels_of_a_region(seed, side, areas):
    random = np.random.default_rng(seed)
    original, changed = random.normal(size=(2, CLASSES, side, side)).astype(np.float32)
    drawn = (random.random((areas, side, side)) < 0.5).astype(np.uint8)
    drawn[:, 0, 0] = 1
    read = RegionScores.of(torch.from_numpy(original)[None], drawn if areas else None)
    scores, shares = (t[0].numpy() for t in read(torch.from_numpy(changed)[None]))
    before = original.argmax(0)
    odds = np.exp(changed)
    at_pixels = odds / odds.sum(0)
    for c in range(CLASSES):
        region = before == c if (before == c).any() else np.ones((side, side), bool)
        assert scores[c] == pytest.approx(changed[c][region].mean(), abs=1e-5)
        assert shares[c] == pytest.approx(at_pixels[c].mean(), abs=1e-5)
        for a, mask in enumerate(drawn.astype(bool), 1):
            column = a * CLASSES + c
            assert scores[column] == pytest.approx(changed[c][mask].mean(), abs=1e-5)
            assert shares[column] == pytest.approx(at_pixels[c][mask].mean(), abs=1e-5)


def test_an_area_finer_than_the_network_weighs_its_pixels_by_what_they_share():
    output = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
    area_of_input = np.array([[[1, 1, 1, 0]]], np.uint8)
    scores, _ = RegionScores.of(output, area_of_input)(output)
    assert scores[0, 2] == pytest.approx((1.0 + 0.5 * 3.0) / 1.5)


def test_a_single_map_tells_an_object_from_the_rest():
    output = torch.tensor([[[[2.0, 2.0], [2.0, -1.0]]]])
    scores, shares = RegionScores.of(output, None)(output)
    assert scores.tolist() == [[1.0, 2.0]]
    z = float(output[0, 0].sigmoid().mean())
    assert shares[0].tolist() == pytest.approx([1 - z, z])


def test_each_area_ranks_its_classes_by_their_pixels(net, engine):
    targets = tuple(Target(cls=in_area(rank(1), n)) for n in range(3))
    item = structs.replace(job("a", targets=targets), areas=np.stack([TOP_LEFT, RIGHT]))
    (found,) = finish(engine, [item])
    shares = net(normalised(item))[0].softmax(0).numpy()
    expected = [shares[:, mask > 0].mean(1).argmax() for mask in (np.ones((8, 8)), TOP_LEFT, RIGHT)]
    explained = [e.target.class_id for e in found.explanations]
    assert explained == [n * CLASSES + c for n, c in enumerate(expected)]
    ranking = [p.probability for p in found.predictions]
    assert ranking == pytest.approx(sorted(shares.mean((1, 2)).tolist(), reverse=True))


def test_order_is_by_score_for_classifiers_and_by_pixels_for_segmentation():
    scores, shares = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.2, 0.5, 0.3]])
    assert ranked(scores, shares, classes=3, task="single_label", count=3).tolist() == [[0, 2, 1]]
    assert ranked(scores, shares, classes=3, task="segmentation", count=3).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("mask", [None, TOP_LEFT, RIGHT])
def test_grad_cam_is_that_of_pytorch_grad_cam(net, engine, mask):
    item = job("a", targets=(Target(cls=index(2)),))
    if mask is not None:
        cls = in_area(index(2), 1)
        item = structs.replace(job("a", targets=(Target(cls=cls),)), areas=mask[None])
    (found,) = finish(engine, [item])
    with torch.no_grad():
        won = (net(normalised(item))[0].argmax(0) == 2).numpy()
    region = mask if mask is not None else won if won.any() else np.ones_like(won)
    target = SemanticSegmentationTarget(2, region.astype(np.float32))
    with peer.GradCAM(model=net, target_layers=[net.out]) as cam:
        (expected,) = cam(normalised(item).requires_grad_(), [target])
    ours = torch.from_numpy(found.explanations[0].map)[None, None]
    assert ours.max() > 0
    # The peer enlarges as OpenCV does, with half-pixel centres, after scaling to [0, 1].
    full = nn.functional.interpolate(ours, (8, 8), mode="bilinear")[0, 0].numpy()
    unit = (full - full.min()) / (full.max() - full.min())
    np.testing.assert_allclose(unit, expected, atol=0.02)


EVERY = tuple(
    name
    for name, row in METHODS.items()
    if row.family != "transformer" and name not in ("cam", "finercam", "shapleycam", "lrp")
)


def test_areas_of_a_batch_do_not_reach_each_other(engine):
    common = {"samples": 6, "steps": 3, "methods": EVERY, "faithfulness": ("deletion", "increase")}
    own, inside = Target(cls=rank(1)), Target(cls=in_area(rank(1), 1))
    contrast = Target(cls=in_area(index(1), 1), against=(in_area(index(2), 1),))
    jobs = [
        job("whole", seed=1, targets=(own, Target(cls=index(3))), **common),
        structs.replace(job("left", seed=1, targets=(inside,), **common), areas=TOP_LEFT[None]),
        structs.replace(job("right", seed=1, targets=(inside,), **common), areas=RIGHT[None]),
        structs.replace(
            job("both", seed=2, targets=(contrast, Target(cls=in_area(index(1), 2))), **common),
            areas=np.stack([RIGHT, TOP_LEFT]),
        ),
        job("predict", "predict", seed=3, targets=()),
    ]
    together = finish(engine, jobs)
    assert all(isinstance(found, Outcome) for found in together), together
    for item, found in zip(jobs, together, strict=True):
        assert_same(found, finish(engine, [item])[0], rtol=1e-4, atol=1e-5)
    left, right = ({e.method: e.map for e in together[place].explanations} for place in (1, 2))
    same = {"eigencam", "kpca_cam", "fem"}
    for name in EVERY:
        assert np.allclose(left[name], right[name]) == (name in same), name
