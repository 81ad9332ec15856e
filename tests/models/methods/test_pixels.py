"""Pixel methods against hand-computed gradients, completeness, float64 autograd and captum."""

from __future__ import annotations

import copy
import importlib
import warnings

import numpy as np
import pytest
import torch
from captum.attr import GuidedBackprop, GuidedGradCam, InputXGradient, IntegratedGradients
from captum.attr import Saliency as CaptumSaliency
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from models.errors import MethodNotApplicable
from models.methods import METHODS, implementation
from models.methods._guided import relus
from models.steps import InputGradient, NotedMaps
from models.targets import ResolvedTarget
from models.types import Intervention

pixels = importlib.import_module("models.methods.pixels")

OWN = [name for name, row in METHODS.items() if row.family == "pixels"]
CONTRAST = ResolvedTarget(1, (0, 3))


class FunctionalNet(nn.Module):
    """Its ReLUs are a module called twice, a function, a method in place, and a ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = nn.functional.relu(self.stem(x))
        x = self.relu(self.body(x))
        x = nn.functional.relu6(self.relu(self.out(x)) * 30)
        return self.fc(x.mean((2, 3)))


class SmoothNet(nn.Module):
    """No rectifier, so that quadrature converges fast and no gradient is piecewise constant."""

    def __init__(self, act: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3, padding=1), act()
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.act(self.stem(x)).mean((2, 3)))


def frozen(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)


def maps_of(made: torch.Tensor | NotedMaps) -> torch.Tensor:
    return made.maps if isinstance(made, NotedMaps) else made


@pytest.fixture
def functional_net() -> nn.Module:
    torch.manual_seed(5)
    net = frozen(FunctionalNet())
    net.out.bias += 0.1  # so that some of its outputs are clipped by the ReLU6
    return net


@pytest.fixture
def smooth_net() -> nn.Module:
    torch.manual_seed(4)
    return frozen(SmoothNet())


@pytest.fixture
def run(drive, subject_of):
    """`run(name, net, x, targets, **options)`: maps of a method, its notes dropped."""

    def run(name, net, x, targets=(0,), **options):
        options = {"samples": 3, "steps": 4} | options
        if not METHODS[name].of_input:
            options.setdefault("layer", "out")
        subject = subject_of(net, x, targets, **options)
        made = drive(implementation(name)(subject), subject)
        return maps_of(made)

    return run


def gradient(net: nn.Module, x: torch.Tensor, target: ResolvedTarget) -> torch.Tensor:
    """Float64 gradient of a target's score at (3, H, W)."""
    net = copy.deepcopy(net).double()
    x = x.double()[None].requires_grad_()
    logits = net(x)[0]
    score = logits[target.cls]
    if target.against:
        score = score - logits[list(target.against)].mean()
    return torch.autograd.grad(score, x)[0][0]


# ---------------------------------------------------------------- one gradient


def test_saliency_and_input_x_gradient_are_the_gradient(run, flat_net, images):
    targets = [ResolvedTarget(2), CONTRAST]
    expected = torch.stack([gradient(flat_net, images[0], target) for target in targets])
    found = run("saliency", flat_net, images[0], targets)
    torch.testing.assert_close(found.double(), expected.abs().amax(1), rtol=1e-4, atol=1e-7)
    found = run("input_x_gradient", flat_net, images[0], targets)
    product = (expected * images[0]).sum(1)
    torch.testing.assert_close(found.double(), product, rtol=1e-4, atol=1e-7)


def test_input_x_gradient_is_complete_without_biases(run, flat_net, images):
    """Euler's identity for a ReLU network without biases and with a linear head."""
    net = frozen(nn.Sequential(flat_net.stem, nn.ReLU(), flat_net.body, nn.ReLU(), nn.Flatten()))
    for layer in (net[0], net[2]):
        layer.bias.zero_()
    total = run("input_x_gradient", net, images[0], [7])[0].sum()
    torch.testing.assert_close(total, net(images[:1])[0, 7])


@pytest.mark.parametrize("name", ["saliency", "input_x_gradient"])
def test_equal_captum(name, run, pool_net, images):
    peer = {"saliency": CaptumSaliency, "input_x_gradient": InputXGradient}[name](pool_net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peer.attribute(images[:1].clone().requires_grad_(), target=3)[0]
    theirs = theirs.amax(0) if name == "saliency" else theirs.sum(0)
    torch.testing.assert_close(run(name, pool_net, images[0], [3])[0], theirs)


# ---------------------------------------------------------------- guided


@pytest.mark.parametrize("inplace", [False, True])
def test_guided_backprop_by_hand(inplace, drive, subject_of, hand_net, hand_input):
    """The published numbers of captum's test of this network."""
    hand_net.relu1.inplace = hand_net.relu2.inplace = inplace
    subject = subject_of(hand_net, hand_input, [0])
    maps = drive(pixels.guided_backprop(subject), subject)
    expected = [[0, 1, 1, 1], [1, 3, 3, 2], [1, 3, 3, 2], [1, 2, 2, 1]]
    np.testing.assert_array_equal(maps[0], expected)


def test_guided_backprop_equals_captum(run, pool_net, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = GuidedBackprop(pool_net).attribute(images[:1].clone().requires_grad_(), target=2)
    ours = run("guided_backprop", pool_net, images[0], [2])
    torch.testing.assert_close(ours[0], theirs[0].abs().amax(0))
    assert not torch.allclose(ours, run("saliency", pool_net, images[0], [2]))


def test_every_relu_is_guided_however_it_is_called(run, functional_net, images):
    """Against the network written out backwards, float64: every ReLU passes (f > 0)(r > 0) r."""
    net, x = functional_net.double(), images[:1].double()
    a = net.stem(x)
    b = net.body(a.relu())
    c = net.out(b.relu())
    d = c.relu() * 30
    pulled = (net.fc.weight[1] / 64).view(1, 4, 1, 1).expand_as(d)
    pulled = pulled.relu() * ((d > 0) & (d < 6)) * 30
    for z, layer in ((c, net.out), (b, net.body), (a, net.stem)):
        pulled = nn.functional.conv_transpose2d(pulled.relu() * (z > 0), layer.weight, padding=1)
    assert bool((d > 6).any())
    expected = pulled[0].abs().amax(0)
    found = run("guided_backprop", functional_net.float(), images[0], [1])[0]
    assert expected.max() > 1e-3
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_relus_are_counted_in_the_graph(functional_net, images):
    scores = functional_net(images.clone().requires_grad_())
    assert len(relus(scores)) == 4


@pytest.mark.parametrize(
    ("act", "said"), [(nn.GELU, "GELU"), (nn.SiLU, "SiLU"), (nn.LeakyReLU, "LeakyReLU")]
)
def test_guided_refuses_other_rectifiers(act, said, run, images):
    with pytest.raises(MethodNotApplicable, match=said):
        run("guided_backprop", frozen(SmoothNet(act)), images[0])


def test_guided_refuses_networks_without_relu(run, smooth_net, images):
    with pytest.raises(MethodNotApplicable, match="none"):
        run("guided_backprop", smooth_net, images[0])


def test_guided_gradcam_equals_captum(run, pool_net, images):
    """Captum multiplies before the absolute value: the same, as Grad-CAM is not negative."""
    pool_net.out.inplace = False
    peer = GuidedGradCam(pool_net, pool_net.out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peer.attribute(
            images[:1].clone().requires_grad_(), target=4, interpolate_mode="bilinear"
        )
    ours = run("guided_gradcam", pool_net, images[0], [4])
    assert ours.max() > 0
    torch.testing.assert_close(ours[0], theirs[0].abs().amax(0), rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- noise and paths


def test_smoothgrad_and_vargrad_are_the_moments_of_noisy_gradients(
    drive, subject_of, flat_net, images
):
    targets = [ResolvedTarget(0), CONTRAST]
    subject = subject_of(flat_net, images[0], targets, samples=7, seed=11)
    smooth = drive(pixels.smoothgrad(subject), subject)
    noisy = [step.inputs for step in drive.taken if isinstance(step, InputGradient)]
    noisy = torch.cat(noisy[::2])
    assert len(noisy) == 7
    noise = (noisy - images[:1]) / (images[0].max() - images[0].min())
    assert 0.13 < noise.std() < 0.17
    for t, target in enumerate(targets):
        gradients = torch.stack([gradient(flat_net, x, target) for x in noisy])
        expected = gradients.mean(0).abs().amax(0)
        torch.testing.assert_close(smooth[t].double(), expected, rtol=1e-4, atol=1e-7)
        variance = drive(pixels.vargrad(subject), subject)[t]
        expected = gradients.var(0, correction=0).sum(0)
        torch.testing.assert_close(variance.double(), expected, rtol=1e-3, atol=1e-9)


def test_noise_follows_the_range_of_the_input(drive, subject_of, flat_net, images):
    for scale in (1.0, 10.0):
        subject = subject_of(flat_net, images[0] * scale, samples=4, seed=3)
        drive(pixels.smoothgrad(subject), subject)
        step = drive.taken[0].inputs - images[:1] * scale
        if scale == 1.0:
            first = step
    torch.testing.assert_close(step, first * 10, rtol=1e-3, atol=1e-4)


def test_vargrad_of_equal_gradients_is_zero_not_below(run, images):
    linear = frozen(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))
    assert torch.equal(run("vargrad", linear, images[0], samples=9), torch.zeros(1, 8, 8))


def test_integrated_gradients_equal_captum(run, smooth_net, images):
    black = torch.full_like(images[:1], -2.0)  # the black picture of the stand-in model
    peer = IntegratedGradients(smooth_net)
    theirs = peer.attribute(images[:1], black, target=2, n_steps=6, method="gausslegendre")
    ours = run("integrated_gradients", smooth_net, images[0], [2], steps=6)
    torch.testing.assert_close(ours[0], theirs[0].float().sum(0), rtol=1e-4, atol=1e-6)


def test_integrated_gradients_are_complete_and_say_so(drive, subject_of, smooth_net, images):
    targets = [ResolvedTarget(0), CONTRAST]
    subject = subject_of(smooth_net, images[0], targets, steps=24)
    made = drive(pixels.integrated_gradients(subject), subject)
    black = smooth_net(torch.full_like(images[:1], -2.0))
    gain = (subject.scores(subject.logits[None]) - subject.scores(black))[0]
    torch.testing.assert_close(made.maps.sum((1, 2)), gain, rtol=1e-4, atol=1e-5)
    for note, expected in zip(made.notes, gain, strict=True):
        words = note.split()
        assert words[:2] == ["Completeness", "delta"]
        assert abs(float(words[2])) < 1e-4
        assert float(words[-1].rstrip(".")) == pytest.approx(float(expected), rel=1e-2)


def test_integrated_gradients_report_what_is_missing(drive, subject_of, smooth_net, images):
    subject = subject_of(smooth_net, images[0] * 9, [1], steps=1)
    made = drive(pixels.integrated_gradients(subject), subject)
    black = smooth_net(torch.full_like(images[:1], -2.0))
    missing = made.maps.sum() - (subject.logits - black[0])[1]
    assert abs(missing) > 0.01
    assert float(made.notes[0].split()[2]) == pytest.approx(float(missing), rel=0.06)


def test_black_pixels_get_nothing_from_integrated_gradients(run, flat_net, images):
    x = images[0].clone()
    x[:, 2:4, 5] = -2.0
    maps = run("integrated_gradients", flat_net, x)
    assert torch.equal(maps[0, 2:4, 5], torch.zeros(2))
    assert maps.abs().max() > 0


# ---------------------------------------------------------------- properties of all


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 5),
    chunk=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_properties(name, drive, subject_of, pool_net, count, chunk, seed, scale):
    """Finite, of the input's size; chunk size, other targets and a second run change nothing."""
    x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) * scale
    targets = [i % 5 for i in range(count)]
    options = {"samples": 5, "steps": 3, "seed": seed, "layer": "out"}

    def maps(targets, chunk):
        subject = subject_of(pool_net, x, targets, chunk=chunk, **options)
        return maps_of(drive(implementation(name)(subject), subject))

    found = maps(targets, chunk)
    assert found.shape == (count, 8, 8)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert METHODS[name].signed or found.min() >= 0
    size = float(found.abs().max())
    torch.testing.assert_close(maps(targets, 4), found, rtol=1e-4, atol=1e-5 * size + 1e-12)
    torch.testing.assert_close(
        maps(targets[-1:], chunk)[0], found[-1], rtol=1e-4, atol=1e-5 * size + 1e-12
    )


@pytest.mark.parametrize("name", OWN)
def test_steps_shared_with_another_job_change_nothing(
    name, drive, subject_of, pool_net, images, untouched
):
    change = Intervention(layer="body", channels=(0, 1, 2, 3), op="scale", value=0.1)
    subjects = [
        subject_of(pool_net, x, [2, 0], "out", samples=3, steps=3, interventions=i)
        for x, i in zip(images[:2], ((), (change,)), strict=True)
    ]
    method = implementation(name)
    with untouched(pool_net):
        together = drive.together([(method(s), s) for s in subjects])
        alone = [drive(method(s), s) for s in subjects]
    plain = subject_of(pool_net, images[1], [2, 0], "out", samples=3, steps=3)
    unchanged = drive(method(plain), plain)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(maps_of(a), maps_of(b))
    assert not torch.allclose(maps_of(alone[1]), maps_of(unchanged))


@pytest.mark.parametrize("name", ["smoothgrad", "vargrad"])
def test_seeds(name, run, pool_net, images):
    same = [run(name, pool_net, images[0], seed=5) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.allclose(same[0], run(name, pool_net, images[0], seed=6))


@pytest.mark.parametrize("name", ["guided_backprop", "lrp"])
def test_nothing_is_left_after_a_refusal(name, run, images, untouched):
    net = frozen(SmoothNet(nn.GELU))
    with untouched(net), pytest.raises(MethodNotApplicable):
        run(name, net, images[0])
    torch.testing.assert_close(net(images), net(images))
