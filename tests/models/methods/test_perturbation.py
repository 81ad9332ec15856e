"""Perturbation methods against their definitions written as loops, peers, and identities."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, Occlusion
from torch import nn

from models.head import HeadProbe
from models.layers import TokenLayout
from models.methods import METHODS, implementation
from models.methods.perturbation import RandomMasks, unit_masks, varying_channels
from models.steps import Forward, NotedMaps, Unbatched
from models.targets import ResolvedTarget, class_scores, log_probabilities
from models.types import Intervention
from tests.models.conftest import frozen
from tests.models.test_engine import finish, job, normalised


def run(drive, name: str, subject) -> torch.Tensor:
    """The maps of a method."""
    made = drive(implementation(name)(subject), subject)
    return made.maps if isinstance(made, NotedMaps) else made


OWN = [name for name, row in METHODS.items() if row.family == "perturbation"]
LAYERED = [name for name in OWN if not METHODS[name].of_input]
TARGETS = [1, ResolvedTarget(3, (0, 2))]
OPTIONS = {
    "ss_cam": {"samples": 3},
    "is_cam": {"samples": 3},
    "occlusion": {"steps": 3},
    "rise": {"samples": 21},
}


class TokenNet(nn.Module):
    """One attention block over four patches and a class token, read at the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 6))
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        tokens = tokens + nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(tokens[:, 0])


class JoinNet(nn.Module):
    """Joins what precedes the layer to what follows, so that the batch cannot grow there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.stem(x).relu()
        return self.fc(torch.cat([low, self.out(low).relu()], 1).mean((2, 3)).square())


class GrowingNet(nn.Module):
    """Mixes the rows of a batch that grew at the layer: an untouched row would answer wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        after = self.out(x).relu()
        if len(after) > len(x):
            after = after.mean(0, keepdim=True).expand_as(after)
        return self.fc(after.mean((2, 3)))


TOKENS = {"norm": TokenLayout(grid=(2, 2), prefix=1)}


@pytest.fixture
def token_net() -> nn.Module:
    torch.manual_seed(6)
    return frozen(TokenNet())


def value(target, logits):
    """Score of a target, by definition."""
    if isinstance(target, int):
        return logits[target]
    return logits[target.cls] - np.mean([logits[i] for i in target.against])


def answer(net, x) -> np.ndarray:
    """Logits of one input (3, H, W), float64 network."""
    return net(x[None])[0].numpy()


def enlarged(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with half-pixel centres, pixel by pixel."""
    h, w = grid.shape
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
            low = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + low * (y - y0)
    return out


def score_weighted(net, x, activation, rounds) -> np.ndarray:
    """Score-CAM and its relatives in float64, channel by channel."""
    found = []
    for target in TARGETS:
        scores = []
        for channel in activation:
            mask = enlarged(channel, *x.shape[1:])
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            each = [value(target, answer(net, x * torch.from_numpy(r(mask)))) for r in rounds]
            scores.append(np.mean(each))
        weights = np.exp(scores) / np.exp(scores).sum()
        found.append(np.maximum(np.tensordot(weights, activation, 1), 0))
    return np.stack(found)


def rounds_of(name, seed):
    if name == "scorecam":
        return [lambda mask: mask]
    if name == "is_cam":
        return [lambda mask, i=i: mask * i / 3 for i in (1, 2, 3)]
    rng = torch.Generator().manual_seed(seed)
    noises = [2 * torch.randn(8, 8, generator=rng).double().numpy() for _ in range(3)]
    return [lambda mask, n=n: mask + n for n in noises]


@pytest.mark.parametrize("name", ["scorecam", "ss_cam", "is_cam"])
def test_score_weighted_methods_by_definition(name, drive, subject_of, flat_net, images):
    options = OPTIONS.get(name, {})
    subject = subject_of(flat_net, images[0], TARGETS, "body", gradients=False, seed=9, **options)
    found = run(drive, name, subject)
    activation = subject.capture.activation[0].double().numpy()
    assert len(varying_channels(subject.capture.activation[0])) == len(activation)
    expected = score_weighted(flat_net.double(), images[0].double(), activation, rounds_of(name, 9))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert all(isinstance(step, Forward) for step in drive.taken)


def test_scorecam_leaves_constant_channels_out(drive, subject_of, flat_net, images):
    subject = subject_of(flat_net, images[0], [1], "body")
    subject.capture.activation[0, [0, 4]] = 0.0
    subject.capture.activation[0, 2] = 1.5
    run(drive, "scorecam", subject)
    assert sum(len(step.inputs) for step in drive.taken) == 3
    assert all(step.inputs.isfinite().all() for step in drive.taken)
    subject.capture.activation.fill_(2.0)
    empty = run(drive, "scorecam", subject)
    assert not drive.taken
    assert torch.equal(empty, torch.zeros(1, 4, 4))


def test_scorecam_of_the_strongest_channels(drive, subject_of, flat_net, images):
    subject = subject_of(flat_net, images[0], [1, 4], "body", samples=2)
    activation = subject.capture.activation[0]
    strongest = sorted(range(6), key=lambda k: -float(activation[k].square().sum()))[:2]
    found = run(drive, "scorecam", subject)
    assert sum(len(step.inputs) for step in drive.taken) == 2
    made = drive(implementation("scorecam")(subject), subject)
    assert made.notes == ("Made from the strongest 2 of 6 channels.",) * 2
    activation[[k for k in range(6) if k not in strongest]] = 0.0
    torch.testing.assert_close(found, run(drive, "scorecam", subject))


def test_masks_reach_both_ends():
    channels = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)) * 1e-4 - 3
    masks = unit_masks(channels, (24, 56))
    assert torch.equal(masks.amin((1, 2, 3)), torch.zeros(5))
    assert torch.equal(masks.amax((1, 2, 3)), torch.ones(5))


def ablated(net, layer, x, *, layout=None) -> tuple[np.ndarray, np.ndarray]:
    """Activation and drops (K, classes) in float64, one whole pass for each channel."""
    caught = {}

    def tap(module, args, output):
        caught["raw"] = output
        if "channel" not in caught:
            return None
        changed = output.clone()
        if layout is None:
            changed[:, caught["channel"]] = 0
        else:
            changed[:, layout.prefix :, caught["channel"]] = 0
        return changed

    handle = net.get_submodule(layer).register_forward_hook(tap)
    whole = answer(net, x)
    activation = caught["raw"] if layout is None else layout.to_map(caught["raw"])
    drops = []
    for channel in range(activation.shape[1]):
        caught["channel"] = channel
        drops.append(whole - answer(net, x))
    handle.remove()
    return activation[0].numpy(), np.stack(drops)


def assert_ablation(found, net, layer, x, *, layout=None):
    activation, drops = ablated(net.double(), layer, x.double(), layout=layout)
    whole = answer(net, x.double())
    for target, found_map in zip(TARGETS, found, strict=True):
        weights = np.array([value(target, d) for d in drops]) / abs(value(target, whole))
        expected = np.maximum(np.tensordot(weights, activation, 1), 0)
        np.testing.assert_allclose(found_map, expected, rtol=1e-3, atol=1e-5)


def test_ablationcam_by_hand(drive, subject_of, hand_net, hand_input):
    subject = subject_of(hand_net, hand_input, [0], "relu1")
    found = run(drive, "ablationcam", subject)
    np.testing.assert_allclose(found.flatten(), [0, 4, 28.66667, 34.16667], rtol=1e-5)


def test_ablationcam_on_pooled_linear_heads_needs_no_pass(drive, subject_of, pool_net, images):
    subject = subject_of(pool_net, images[0], TARGETS, "out", gradients=False)
    found = run(drive, "ablationcam", subject)
    assert not drive.taken
    assert_ablation(found, pool_net, "out", images[0])


@pytest.mark.parametrize(("is_target", "replays"), [(True, 1), (False, 3)])
def test_ablationcam_replays_other_heads_with_one_backbone_row(
    is_target, replays, drive, subject_of, flat_net, images, untouched
):
    """All six channels at once after the target layer, chunks of two after any other."""
    subject = subject_of(flat_net, images[0], TARGETS, "out", gradients=False, chunk=2)
    if not is_target:
        subject = replace(subject, head=None)
    rows = []
    watch = flat_net.stem.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    with untouched(flat_net):
        found = run(drive, "ablationcam", subject)
    watch.remove()
    assert rows == [1] * (1 + len(drive.taken))
    assert len(drive.taken) == 1 + replays
    assert_ablation(found, flat_net, "out", images[0])


@pytest.mark.parametrize("kind", [JoinNet, GrowingNet])
def test_ablationcam_where_the_batch_cannot_grow(kind, drive, subject_of, images, untouched):
    torch.manual_seed(4)
    net = frozen(kind())
    subject = subject_of(net, images[0], TARGETS, "out", gradients=False)
    # The closed form would hold for the second one: not what is tested here.
    subject = replace(subject, head=HeadProbe(kind="flatten"))
    with untouched(net):
        found = run(drive, "ablationcam", subject)
    assert_ablation(found, net, "out", images[0])


def test_ablationcam_of_tokens_leaves_the_class_token(drive, subject_of, token_net, images):
    subject = subject_of(token_net, images[0], TARGETS, "norm", layouts=TOKENS, chunk=3)
    found = run(drive, "ablationcam", subject)
    assert found.shape == (2, 2, 2)
    assert_ablation(found, token_net, "norm", images[0], layout=TOKENS["norm"])


def test_ablationcam_does_not_flip_with_the_score(drive, subject_of, pool_net, images):
    """A channel that supports the class weighs positively even if its score is negative."""
    pool_net.fc.weight.abs_()
    pool_net.fc.bias -= 50
    subject = subject_of(pool_net, images[0], [1], "out")
    assert float(subject.capture.score) < 0
    found = run(drive, "ablationcam", subject)
    weights = pool_net.fc.weight[1] * subject.capture.activation[0].mean((1, 2))
    expected = torch.einsum("k,khw->hw", weights, subject.capture.activation[0]).relu()
    torch.testing.assert_close(found[0] * subject.capture.score[0].abs(), expected)
    assert found.max() > 0


@pytest.mark.parametrize("layer", ["out", "fc"])
def test_ablationcam_under_interventions(layer, drive, subject_of, pool_net, images):
    """Later layers may be changed too: the closed form is not used then."""
    change = Intervention(layer=layer, channels=(1,), op="scale", value=-2.0)
    layouts = {"out": None, "fc": None}
    subject = subject_of(pool_net, images[0], [1], "out", interventions=(change,), layouts=layouts)
    found = run(drive, "ablationcam", subject)
    assert all(isinstance(step, Unbatched) for step in drive.taken)
    activation = subject.capture.activation[0]
    weights = pool_net.fc.weight[1] * activation.mean((1, 2))
    weights = weights * (-2 if layer == "fc" else 1) / subject.capture.score[0].abs()
    torch.testing.assert_close(found[0], torch.einsum("k,khw->hw", weights, activation).relu())


def test_occlusion_is_captums(drive, subject_of, flat_net, images):
    """Windows of 4 x 4 pixels at stride 2."""
    subject = subject_of(flat_net, images[0], TARGETS, steps=3)
    found = run(drive, "occlusion", subject)
    assert found.shape == (2, 4, 4)

    def score(x):
        return subject.scores(flat_net(x))

    for t in range(2):
        expected = Occlusion(score).attribute(
            images[:1], sliding_window_shapes=(3, 4, 4), strides=(3, 2, 2), target=t
        )
        torch.testing.assert_close(
            found[t].repeat_interleave(2, 0).repeat_interleave(2, 1), expected[0, 0]
        )


def test_occlusion_of_one_window_is_feature_ablation(drive, subject_of, flat_net, images):
    subject = subject_of(flat_net, images[0], [2], steps=1)
    found = run(drive, "occlusion", subject)
    expected = FeatureAblation(flat_net).attribute(
        images[:1], target=2, feature_mask=torch.zeros(1, 1, 1, 1, dtype=torch.long)
    )
    torch.testing.assert_close(found[0], expected[0, 0, :2, :2])


def test_occlusion_by_definition_on_odd_sides(drive, subject_of, pool_net):
    x = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(1))
    subject = subject_of(pool_net, x, [0], steps=2)
    found = run(drive, "occlusion", subject)[0]
    rows, columns = [0, 2, 5, 7], [0, 4, 7, 11]
    whole, sums, counts = float(pool_net(x[None])[0, 0]), np.zeros((3, 3)), np.zeros((3, 3))
    for r in range(2):
        for c in range(2):
            hidden = x.clone()
            hidden[:, rows[r] : rows[r + 2], columns[c] : columns[c + 2]] = 0
            sums[r : r + 2, c : c + 2] += whole - float(pool_net(hidden[None])[0, 0])
            counts[r : r + 2, c : c + 2] += 1
    np.testing.assert_allclose(found, sums / counts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_rise_by_definition(task, drive, subject_of, flat_net, images):
    subject = subject_of(flat_net, images[0], TARGETS, samples=21, seed=5, task=task)
    found = run(drive, "rise", subject)
    random = RandomMasks.draw(21, (8, 8), torch.Generator().manual_seed(5))
    net, x, cell = flat_net.double(), images[0].double(), math.ceil(8 / 7)
    expected = np.zeros((2, 8, 8))
    for grid, (y, left) in zip(random.grids.numpy(), random.shifts.tolist(), strict=True):
        mask = enlarged(grid, 8 * cell, 8 * cell)[y : y + 8, left : left + 8]
        logits = answer(net, x * torch.from_numpy(mask))
        share = (
            1 / (1 + np.exp(-logits))
            if task == "multi_label"
            else np.exp(logits) / np.exp(logits).sum()
        )
        for t, target in enumerate(TARGETS):
            expected[t] += value(target, share) * mask / (21 * 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_rise_masks_are_kept_as_grids_and_cover_evenly():
    random = RandomMasks.draw(2000, (30, 17), torch.Generator().manual_seed(0))
    assert random.grids.numel() == 2000 * 49
    assert random.grids.mean() == pytest.approx(0.5, abs=0.01)
    assert random.shifts.amax(0).tolist() == [4, 2]
    masks = random.masks(0, 2000, torch.device("cpu"))
    assert masks.shape == (2000, 30, 17)
    assert 0 <= masks.min() < masks.max() <= 1
    assert (masks.mean(0) - 0.5).abs().max() < 0.05
    torch.testing.assert_close(random.masks(7, 9, torch.device("cpu")), masks[7:9])


def test_rise_finds_the_pixels_that_count(drive, subject_of):
    class Corner(nn.Module):
        def forward(self, x):
            bright = x[:, :, :8, :8].mean((1, 2, 3)) - 0.5
            return torch.stack([4 * bright, -4 * bright], 1)

    subject = subject_of(frozen(Corner()), torch.ones(3, 28, 28), [0, 1], samples=400)
    found, other = run(drive, "rise", subject)
    assert found[:8, :8].mean() > 1.2 * found[14:, 14:].mean()
    assert other[:8, :8].mean() < other[14:, 14:].mean()


@pytest.mark.parametrize(
    ("task", "outputs"),
    [("binary", 1), ("single_label", 2), ("multi_label", 3), ("single_label", 3)],
)
def test_log_probabilities_of_scores(task, outputs):
    output = torch.randn(4, outputs, generator=torch.Generator().manual_seed(0))
    scores, expected = class_scores(output, task)
    torch.testing.assert_close(log_probabilities(scores, task).exp(), expected)


def test_opposite_logits_of_two_classes_are_not_taken_for_a_single_logit():
    scores, expected = class_scores(torch.tensor([[-1.0, 1.0]]), "single_label")
    torch.testing.assert_close(log_probabilities(scores, "single_label").exp(), expected)


@pytest.mark.parametrize("name", OWN)
def test_common_properties(name, drive, subject_of, flat_net, images, untouched):
    """Finite, of the right shape, the same at any chunk size; the network is left alone."""
    layer = "" if name not in LAYERED else "out"
    options = OPTIONS.get(name, {})

    def subject(chunk, image=0, targets=TARGETS, seed=3):
        return subject_of(
            flat_net,
            images[image],
            targets,
            layer,
            gradients=False,
            chunk=chunk,
            seed=seed,
            **options,
        )

    method = implementation(name)
    with untouched(flat_net):
        expected = run(drive, name, subject(4))
        assert expected.isfinite().all()
        assert expected.dtype == torch.float32
        assert len(expected) == 2
        assert METHODS[name].signed or expected.min() >= -1e-6 or name == "rise"
        for chunk in (1, 3, 64):
            torch.testing.assert_close(run(drive, name, subject(chunk)), expected)
        both = [subject(3), subject(5, image=1, targets=[0])]
        first, second = (
            made.maps if isinstance(made, NotedMaps) else made
            for made in drive.together([(method(s), s) for s in both])
        )
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(second, run(drive, name, both[1]))
        if "seed" in METHODS[name].defaults:
            other = run(drive, name, subject(4, seed=4))
            assert not torch.allclose(other, expected)


@pytest.mark.parametrize("name", OWN)
def test_given_up_half_way_leaves_nothing(name, subject_of, flat_net, images, untouched):
    layer = "" if name not in LAYERED else "out"
    with untouched(flat_net):
        subject = subject_of(
            flat_net, images[0], [1], layer, gradients=False, **OPTIONS.get(name, {})
        )
        steps = implementation(name)(subject)
        step = next(steps)
        if isinstance(step, Unbatched):
            step.run()
        steps.close()


def test_the_engine_answers_with_all_of_them(flat_engine, flat_net, drive, subject_of):
    item = job("all", seed=4, methods=tuple(OWN), layers=("body",), samples=3, steps=3)
    outcome = finish(flat_engine, [item])[0]
    layers = {e.method: e.layer for e in outcome.explanations}
    assert layers == {name: "body" if name in LAYERED else "" for name in OWN}
    for explained in outcome.explanations:
        cls, layer = explained.target.class_id, explained.layer
        subject = subject_of(
            flat_net, normalised(item), [cls], layer, samples=3, steps=3, gradients=False
        )
        expected = run(drive, explained.method, subject)[0]
        np.testing.assert_allclose(explained.map, expected, rtol=1e-4, atol=1e-6)
