"""Gradient methods in steps: Smooth Grad-CAM++, Finer-CAM, ShapleyCAM; and element-wise.

The oracles are the definitions in float64, written out with autograd on whole networks, and what
the methods become where a head is linear, noise is nil, or a utility has no curvature.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.capture import Capture
from models.layers import TokenLayout
from models.methods.gradient import (
    finercam,
    gradcam,
    gradcam_elementwise,
    gradcam_plus_plus,
    gradcam_weights,
    layercam,
    shapleycam,
    smooth_gradcam_plus_plus,
)
from models.steps import LayerGradient
from models.targets import ResolvedTarget
from models.types import Intervention

# Changes nothing, but forbids short cuts for linear heads.
SAME = (Intervention(layer="stem", channels=(0,), op="scale", value=1.0),)
PASSES = [smooth_gradcam_plus_plus, finercam, shapleycam]


# ---------------------------------------------------------------- element-wise


def test_elementwise_by_hand(hand_net, hand_input, capture_of):
    """A = [0 4; 31 40], [0 0; 6 15], g = [1 1; 1 1], [1 -1; -1 -1]: channel 2 is all against."""
    maps = gradcam_elementwise(capture_of(hand_net, hand_input, "relu1", [0]))
    torch.testing.assert_close(maps, torch.tensor([[[[0.0, 4], [31, 40]]]]))


@given(seed=st.integers(0, 2**16), short=st.booleans(), signed=st.booleans())
def test_elementwise_by_definition(seed, short, signed):
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 4, 3, 2, generator=rng)
    a = a if signed else a.relu()
    g = torch.randn(2, 3, 4, *((1, 1) if short else (3, 2)), generator=rng)
    capture = Capture("x", a, g, torch.zeros(2, 3))
    expected = np.maximum(g.numpy() * a[:, None].numpy(), 0).sum(2)
    np.testing.assert_allclose(gradcam_elementwise(capture), expected, rtol=1e-5, atol=1e-6)
    if not signed:
        torch.testing.assert_close(gradcam_elementwise(capture), layercam(capture))


# ---------------------------------------------------------------- Smooth Grad-CAM++


def smooth_by_definition(subject, capture_of, noise) -> np.ndarray:
    """The formula with a pass for each sample, float64, one target after the other."""
    a = subject.capture.activation[0].double().numpy()
    noisy = torch.cat([subject.inputs + n for n in noise])
    g = capture_of(subject.module, noisy, subject.layer, subject.targets).gradient
    maps = []
    for t in range(len(subject.targets)):
        d1, d2, d3 = ((g[:, t].double().numpy() ** p).mean(0) for p in (1, 2, 3))
        denominator = 2 * d2 + a.sum((1, 2), keepdims=True) * d3
        alpha = np.divide(d2, denominator, out=np.zeros_like(d2), where=d2 > 0)
        weights = (alpha * np.maximum(d1, 0)).sum((1, 2))
        maps.append(np.maximum(np.tensordot(weights, a, 1), 0))
    return np.stack(maps)


def test_smooth_by_definition(subject_of, drive, capture_of, flat_net, images):
    targets = [0, ResolvedTarget(3, (1, 2))]
    flat_net.fc1.weight.mul_(8)  # into the bend of tanh, so that gradients move with the noise
    subject = subject_of(flat_net, images[0], targets, "out", samples=5, seed=9, chunk=4)
    maps = drive(smooth_gradcam_plus_plus(subject), subject)
    random = torch.Generator().manual_seed(9)
    deviation = 0.15 * (images[0].max() - images[0].min())
    noise = [deviation * torch.randn(1, 3, 8, 8, generator=random) for _ in range(5)]
    expected = smooth_by_definition(subject, capture_of, noise)
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-5 * expected.max())
    assert maps.amax((1, 2)).min() > 0
    other = smooth_by_definition(subject, capture_of, [n * 16 / 15 for n in noise])
    assert np.abs(other - expected).max() > 0.01 * expected.max()


def test_smooth_without_noise_is_plus_plus(subject_of, drive, flat_net, images, monkeypatch):
    monkeypatch.setattr(sys.modules["models.methods.gradient"], "_NOISE", 0.0)
    subject = subject_of(flat_net, images[0], [0, 4], "out", samples=3)
    maps = drive(smooth_gradcam_plus_plus(subject), subject)
    torch.testing.assert_close(maps, gradcam_plus_plus(subject.capture)[0])


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_smooth_does_not_depend_on_the_chunk(chunk, subject_of, drive, flat_net, images):
    subject = subject_of(flat_net, images[0], [1, 2], "out", samples=7, chunk=4)
    expected = drive(smooth_gradcam_plus_plus(subject), subject)
    again = replace(subject, chunk=chunk)
    torch.testing.assert_close(drive(smooth_gradcam_plus_plus(again), again), expected)


def test_smooth_is_reproducible_by_its_seed(subject_of, drive, flat_net, images):
    maps = []
    for seed in (1, 1, 2):
        subject = subject_of(flat_net, images[0], [1], "out", samples=2, seed=seed)
        maps.append(drive(smooth_gradcam_plus_plus(subject), subject))
    assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2])


# ---------------------------------------------------------------- Finer-CAM


def contrast_map(net, x, layer, score) -> torch.Tensor:
    """Grad-CAM of any function of the logits."""
    kept = []

    def cut(_module, _args, output):
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()

    handle = net.get_submodule(layer).register_forward_hook(cut)
    value = score(net(x)[0])
    handle.remove()
    (g,) = torch.autograd.grad(value, kept[0])
    return (g.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach()


def closest(logits: torch.Tensor, c: int) -> list[int]:
    others = [d for d in range(len(logits)) if d != c]
    return sorted(others, key=lambda d: (abs(float(logits[d] - logits[c])), d))[:3]


@pytest.mark.parametrize("interventions", [(), SAME])
@pytest.mark.parametrize("name", ["flat_net", "pool_net"])
def test_finercam_is_gradcam_of_the_contrast(
    name, interventions, request, subject_of, drive, images
):
    net = request.getfixturevalue(name)
    for x in images:
        targets = [2, ResolvedTarget(0, (4,)), 1]
        subject = subject_of(net, x, targets, "out", interventions=interventions)
        maps = drive(finercam(subject), subject)
        for m, target in zip(maps, subject.targets, strict=True):
            against = list(target.against) or closest(subject.logits, target.cls)
            expected = contrast_map(
                net, x[None], "out", lambda y, t=target, d=against: y[t.cls] - 0.6 * y[d].mean()
            )
            torch.testing.assert_close(m, expected[0], rtol=1e-4, atol=1e-6)


def test_finercam_breaks_ties_by_the_lower_index(subject_of, drive, pool_net, images):
    """Class 2 equals classes 0 and 4; of the others 1 and 3 are equally far."""
    with torch.no_grad():
        pool_net.fc.weight.copy_(torch.randn(6).expand(5, 6))
        pool_net.fc.bias.copy_(torch.tensor([0.0, 3, 0, -3, 0]))
        pool_net.fc.weight[1] *= 1.5
        pool_net.fc.weight[3] *= 0.5
    subject = subject_of(pool_net, images[0], [2], "out")
    y = float(subject.logits[2])
    logits = torch.tensor([y, y + 3, y, y - 3, y])
    maps = drive(finercam(replace(subject, logits=logits)), subject)
    w = pool_net.fc.weight
    rows = w[2] - 0.6 * w[[0, 4, 1]].mean(0)
    expected = torch.einsum("k,khw->hw", rows / 16, subject.capture.activation[0]).relu()
    torch.testing.assert_close(maps[0], expected)


def test_finercam_with_no_other_class_is_gradcam(subject_of, drive, images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(4, 1)).eval().requires_grad_(False)
    net[4].weight.abs_()
    subject = subject_of(net, images[0], [0], "1", task="multi_label")
    torch.testing.assert_close(drive(finercam(subject), subject), gradcam(subject.capture)[0])


# ---------------------------------------------------------------- ShapleyCAM


def shapley_weights(head, a, utility) -> torch.Tensor:
    """Weights (K,) by the whole Hessian in float64; `head` maps an activation to logits."""

    def u(values):
        return utility(head(values.view(1, *a.shape))[0])

    a = a.double()
    flat = a.flatten().requires_grad_()
    g = torch.autograd.functional.jacobian(u, flat)
    h = torch.autograd.functional.hessian(u, flat)
    return (g - 0.5 * h @ flat.detach()).view(a.shape).mean((1, 2))


def rest(target: ResolvedTarget):
    def utility(y):
        against = y[list(target.against)].mean() if target.against else 0
        return y[target.cls] - against + y.log_softmax(0)[target.cls]

    return utility


def flat_head(net):
    double = [layer.double() for layer in (net.fc1, net.fc2)]
    return lambda a: double[1](double[0](a.flatten(1)).tanh())


@pytest.mark.parametrize("scale", [None, 3.0])
def test_shapleycam_by_the_whole_hessian(scale, subject_of, drive, flat_net, images, untouched):
    """Of what the layer gives when an earlier one is changed, too."""
    targets = [0, ResolvedTarget(3, (1, 2))]
    change = Intervention(layer="body", channels=(0, 1, 2), op="scale", value=scale or 1.0)
    changes = (change,) if scale else ()
    subject = subject_of(flat_net, 3 * images[0], targets, "out", interventions=changes)
    with untouched(flat_net):
        maps = drive(shapleycam(subject), subject)
    a, head = subject.capture.activation[0], flat_head(flat_net)
    for m, target, plain in zip(
        maps, subject.targets, gradcam_weights(subject.capture)[0], strict=True
    ):
        weights = shapley_weights(head, a, rest(target))
        expected = torch.einsum("k,khw->hw", weights, a.double()).relu()
        torch.testing.assert_close(m.double(), expected, rtol=1e-4, atol=1e-6)
        assert (weights - plain).abs().max() > 0.05 * plain.abs().max()


@pytest.mark.parametrize("interventions", [(), SAME])
@pytest.mark.parametrize(
    ("task", "classes"), [("single_label", 5), ("multi_label", 5), ("binary", 1)]
)
def test_shapleycam_of_linear_heads(task, classes, interventions, subject_of, drive, images):
    """In closed form and through the network, for every task."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(6, classes)).eval().requires_grad_(False)
    net[4].weight *= 5
    change = tuple(replace_layer(i, "0") for i in interventions)
    subject = subject_of(net, images[0], [1, 0], "1", task=task, interventions=change)
    maps = drive(shapleycam(subject), subject)
    assert bool(drive.taken) == bool(interventions)

    def utility(c):
        def u(y):
            if classes == 1:
                y = torch.cat([-y, y])
            log_p = y.log_softmax(0) if task == "single_label" else y.sigmoid().log()
            return y[c] + log_p[c]

        return u

    a, head = subject.capture.activation[0], net[2:].double()
    for m, c in zip(maps, (1, 0), strict=True):
        weights = shapley_weights(head, a, utility(c))
        expected = torch.einsum("k,khw->hw", weights, a.double()).relu()
        torch.testing.assert_close(m.double(), expected, rtol=1e-4, atol=1e-6)


def replace_layer(change: Intervention, layer: str) -> Intervention:
    return Intervention(layer=layer, channels=change.channels, op=change.op, value=change.value)


def test_shapleycam_of_a_pure_logit_is_gradcam(subject_of, drive, pool_net, images, monkeypatch):
    """On a linear head the logit has no curvature; only ReST's second term makes the difference."""
    from models.methods import _shapley

    monkeypatch.setattr(_shapley, "log_probabilities", lambda scores, _: 0 * scores)
    for interventions in ((), SAME):
        subject = subject_of(pool_net, images[1], [0, 3], "out", interventions=interventions)
        maps = drive(shapleycam(subject), subject)
        torch.testing.assert_close(maps, gradcam(subject.capture)[0])


class Attentive(nn.Module):
    """A patch embedding whose tokens attend to each other before they are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 4, stride=4)
        self.tokens = nn.Flatten(2)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 3)

    def head(self, tokens):
        heads = tokens[:, None]  # of four dimensions, which the fused kernels take
        mixed = nn.functional.scaled_dot_product_attention(heads, 2 * heads, heads)
        return self.fc(mixed[:, 0].mean(1))

    def forward(self, x):
        return self.head(self.norm(self.tokens(self.embed(x)).mT))


def test_shapleycam_through_attention_and_tokens(subject_of, drive, images):
    torch.manual_seed(6)
    net = Attentive().eval().requires_grad_(False)
    layouts = {"norm": TokenLayout(grid=(2, 2))}
    subject = subject_of(net, images[0], [1], "norm", layouts=layouts)
    maps = drive(shapleycam(subject), subject)
    double = net.double()
    a = subject.capture.activation[0]
    weights = shapley_weights(lambda m: double.head(m.flatten(2).mT), a, rest(ResolvedTarget(1)))
    expected = torch.einsum("k,khw->hw", weights, a.double()).relu()
    torch.testing.assert_close(maps[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_shapleycam_is_zero_where_the_layer_has_no_part(subject_of, drive, pool_net, images):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare = pool_net, nn.Conv2d(3, 2, 1).requires_grad_(False)

        def forward(self, x):
            self.spare(x)
            return self.net(x)

    subject = subject_of(Aside().eval(), images[0], [0], layouts={"spare": None})
    a = images[:1, :2]
    capture = Capture("spare", a, torch.zeros(1, 1, 2, 8, 8), torch.zeros(1, 1))
    subject = replace(subject, layer="spare", capture=capture)
    assert not drive(shapleycam(subject), subject).any()


# ---------------------------------------------------------------- all


@pytest.mark.parametrize("method", PASSES)
def test_linear_heads_need_no_step_and_get_the_same_map(
    method, subject_of, drive, pool_net, images
):
    subject = subject_of(pool_net, images[0], [1, 3], "out", samples=3)
    maps = drive(method(subject), subject)
    assert not drive.taken
    with_passes = subject_of(pool_net, images[0], [1, 3], "out", samples=3, interventions=SAME)
    torch.testing.assert_close(drive(method(with_passes), with_passes), maps)
    assert drive.taken


@pytest.mark.parametrize("method", PASSES)
def test_other_layers_of_a_linear_head_are_passed_through(
    method, subject_of, drive, pool_net, images
):
    subject = subject_of(pool_net, images[0], [1], "act", samples=2)
    assert subject.head.weight is None
    drive(method(subject), subject)
    assert drive.taken


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("name", ["flat_net", "pool_net"])
def test_targets_together_equal_targets_alone(method, name, request, subject_of, drive, images):
    net = request.getfixturevalue(name)
    subject = subject_of(net, images[2], [0, 1, 2, 3, 4], "out", samples=3, chunk=2)
    maps = drive(method(subject), subject)
    assert maps.shape == (5, 4, 4)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert maps.min() >= 0
    for t in range(5):
        alone = subject_of(net, images[2], [t], "out", samples=3)
        torch.testing.assert_close(drive(method(alone), alone)[0], maps[t], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("name", ["flat_net", "pool_net"])
def test_pairs_of_more_targets_than_the_subject_has(
    method, name, request, subject_of, drive, images
):
    """The pass gives every image of a batch as many targets as the one with most."""
    net = request.getfixturevalue(name)
    many = subject_of(net, images[0], [2, 4, 0], "out", samples=2)
    few = replace(many, targets=many.targets[:2])
    expected = drive(method(many), many)[:2]
    torch.testing.assert_close(drive(method(few), few), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", PASSES)
def test_jobs_that_share_steps_get_what_they_get_alone(
    method, subject_of, drive, flat_net, images, untouched
):
    strong = Intervention(layer="body", channels=(0, 1), op="scale", value=4.0)
    wants = [([0], ()), ([1, 2], (strong,)), ([3], ())]
    subjects = [
        subject_of(flat_net, x, t, "out", samples=4, seed=i, interventions=c)
        for i, (x, (t, c)) in enumerate(zip(images, wants, strict=False))
    ]
    with untouched(flat_net):
        alone = [drive(method(s), s) for s in subjects]
        together = drive.together([(method(s), s) for s in subjects])
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    unchanged = subject_of(flat_net, images[1], [1, 2], "out", samples=4, seed=1)
    assert not torch.allclose(drive(method(unchanged), unchanged), alone[1])


def test_smooth_and_finercam_share_steps_with_other_jobs(subject_of, drive, flat_net, images):
    for method in (smooth_gradcam_plus_plus, finercam):
        subject = subject_of(flat_net, images[0], [0], "out", samples=2)
        drive(method(subject), subject)
        assert all(isinstance(step, LayerGradient) for step in drive.taken)
