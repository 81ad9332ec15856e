"""LRP against its rules written out with Jacobians in float64, captum, and conservation."""

from __future__ import annotations

import importlib
import warnings

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from models.errors import MethodNotApplicable
from models.methods import _lrp_rules
from models.methods._lrp import Rules
from models.methods._lrp_rules import Affine, box_rule, clipped, epsilon_rule, gamma_rule
from models.targets import ResolvedTarget

pixels = importlib.import_module("models.methods.pixels")

GAMMA, EPSILON = 0.25, 0.25
LOW, HIGH = -2.0, 2.0


class ConvNet(nn.Module):
    """What CNNs are made of: normalisation, a residual, ReLU6, pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.act = nn.ReLU6(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16, 6)
        self.fc2 = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        y = self.norm2(self.body(x))
        y += x
        x = self.pool(self.act(y * 4)).flatten(1)
        return self.fc2(functional.relu(self.fc1(x)))


def frozen(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
    return net.eval().requires_grad_(False)


@pytest.fixture
def conv_net() -> nn.Module:
    torch.manual_seed(8)
    return frozen(ConvNet())


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) * (HIGH - LOW) + LOW


@pytest.fixture
def run(drive, subject_of):
    def run(net, x, targets=(0,), **options):
        subject = subject_of(net, x, targets, **options)
        return drive(pixels.lrp(subject), subject)

    return run


# ---------------------------------------------------------------- the rules as matrices


def matrix(function, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """W (outputs, inputs) and b (outputs,) of an affine function, float64."""
    flat = torch.autograd.functional.jacobian(function, x)
    weight = flat.reshape(-1, x.numel())
    return weight.numpy(), (function(x).flatten() - weight @ x.flatten()).detach().numpy()


def by_gamma(x, weight, bias, relevance):
    """Relevance of the inputs and of the bias, looped over outputs."""
    inputs, held = np.zeros_like(x), 0.0
    for j, r in enumerate(relevance):
        shares, own = x * weight[j], bias[j]
        sign = 1 if shares.sum() + own > 0 else -1
        shares = shares + GAMMA * np.where(sign * shares > 0, shares, 0)
        own = own + GAMMA * (own if sign * own > 0 else 0)
        total = shares.sum() + own
        inputs += shares / total * r
        held += own / total * r
    return inputs, held


def by_epsilon(x, weight, bias, relevance):
    z = weight @ x + bias
    z_stable = z + EPSILON * np.sqrt((z**2).mean()) * np.sign(z)
    inputs = x * (weight.T @ (relevance / z_stable))
    return inputs, relevance.sum() - inputs.sum()


def by_box(x, weight, bias, relevance):
    del bias
    inputs = np.zeros_like(x)
    for j, r in enumerate(relevance):
        shares = x * weight[j] - np.where(weight[j] > 0, LOW, HIGH) * weight[j]
        inputs += shares / shares.sum() * r
    return inputs, 0.0


def written_out(net: ConvNet, x: torch.Tensor, target: ResolvedTarget) -> tuple[np.ndarray, float]:
    """Relevance of each pixel and colour of (3, H, W), and of all biases, layer by layer."""
    net, x = net.double(), x.double()

    def first(v):
        return net.norm(net.stem(v[None]))[0]

    def second(v):
        return net.norm2(net.body(v[None]))[0]

    a = first(x).relu()
    b = second(a)
    total = b + a
    clip = (total * 4).clamp(0, 6)
    pooled, where = functional.max_pool2d(clip[None], 2, return_indices=True)
    p = pooled.flatten()
    hidden = net.fc1(p).relu()
    logits = net.fc2(hidden).numpy()
    relevance = np.zeros(5)
    relevance[target.cls] = logits[target.cls]
    for other in target.against:
        relevance[other] -= logits[other] / len(target.against)
    biases = 0.0

    def back(rule, function, at, relevance):
        nonlocal biases
        inputs, held = rule(at.flatten().numpy(), *matrix(function, at), relevance.flatten())
        biases += held
        return inputs

    relevance = back(by_epsilon, net.fc2, hidden, relevance)
    relevance = back(by_epsilon, net.fc1, p, relevance)
    unpooled = np.zeros(total.shape).reshape(4, -1)
    np.put_along_axis(unpooled, where[0].flatten(1).numpy(), relevance.reshape(4, -1), 1)
    shared = unpooled.reshape(total.shape) / np.where(total == 0, 1, total).astype(float)
    through = back(by_gamma, second, a, shared * b.numpy()).reshape(a.shape)
    relevance = through + shared * a.numpy()
    relevance = back(by_box, first, x, relevance)
    return relevance.reshape(x.shape), biases


@pytest.mark.parametrize("target", [ResolvedTarget(2), ResolvedTarget(4, (0, 1))])
def test_equals_the_rules_written_out(target, run, conv_net, picture):
    made = run(conv_net, picture, [target])
    expected, held = written_out(conv_net, picture, target)
    assert abs(expected).max() > 1e-3
    np.testing.assert_allclose(
        made.maps[0], expected.sum(0), rtol=1e-3, atol=1e-5 * abs(expected).max()
    )
    conv_net.float()
    logits = conv_net(picture[None])[0]
    score = float(logits[target.cls]) - (
        float(logits[list(target.against)].mean()) if target.against else 0
    )
    assert expected.sum() + held == pytest.approx(score, rel=1e-4)
    reached, of = (float(word) for word in made.notes[0].split()[1:5:3])
    assert reached == pytest.approx(expected.sum(), rel=0.01)
    assert of == pytest.approx(score, rel=0.01)


@given(
    seed=st.integers(0, 2**16),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 5),
    rule=st.sampled_from(["gamma", "epsilon", "box"]),
    biased=st.booleans(),
)
def test_each_rule_equals_its_matrix_form(seed, inputs, outputs, rule, biased):
    rng = torch.Generator().manual_seed(seed)
    x = (torch.rand(inputs, generator=rng).double() * 4 - 2).requires_grad_()
    weight = torch.randn(outputs, inputs, generator=rng).double()
    bias = torch.randn(outputs, generator=rng).double() if biased else None
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    layer = Affine(x=x, weight=weight, bias=bias, apply=functional.linear, convolution=False)
    low, high = (torch.full_like(x, v).detach().requires_grad_() for v in (LOW, HIGH))
    if rule == "box":
        z, by_hand = box_rule(layer, low, high, one), by_box
    else:
        z = {"gamma": gamma_rule, "epsilon": epsilon_rule}[rule](layer, one)
        by_hand = {"gamma": by_gamma, "epsilon": by_epsilon}[rule]
    plain = functional.linear(x, weight, bias).detach()
    torch.testing.assert_close(z.detach(), plain)
    c = torch.randn(outputs, generator=rng).double()
    leaves = [x, low, high, one]
    found = torch.autograd.grad((z * c).sum(), leaves, allow_unused=True)
    shares = [0 if g is None else leaf.detach() * g for leaf, g in zip(leaves, found, strict=True)]
    own = np.zeros(outputs) if bias is None else bias.numpy()
    expected, held = by_hand(x.detach().numpy(), weight.numpy(), own, (plain * c).numpy())
    np.testing.assert_allclose((shares[0] + shares[1] + shares[2]), expected, atol=1e-8)
    if rule != "box":
        np.testing.assert_allclose(float(shares[3]), held, atol=1e-8)


def test_clipping_passes_all_relevance():
    x = torch.tensor([-1.0, 0.0, 2.0, 9.0], requires_grad=True)
    y = clipped(x, 6.0)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 2.0, 6.0]))
    (c,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(x * c, y)


class Flattened(nn.Sequential):
    def forward(self, x):
        return super().forward(x.flatten(1))


def test_equals_captum_where_the_rules_agree(run, monkeypatch, picture):
    """Linear layers with an epsilon that vanishes; captum knows no relative one."""
    monkeypatch.setattr(_lrp_rules, "EPSILON", 1e-9)
    torch.manual_seed(0)
    net = Flattened(nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 5))
    ours = run(frozen(net), picture, [3]).maps
    net.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.attr.LRP(net).attribute(picture[None].clone(), target=3)
    torch.testing.assert_close(ours[0], theirs[0].sum(0).detach(), rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- conservation and refusals


def rules_of(x, *, low=LOW, high=HIGH):
    return Rules(x[None], low=torch.full_like(x[None], low), high=torch.full_like(x[None], high))


def held_and_reached(net, x, target, **bounds):
    rules = rules_of(x, **bounds)
    with rules:
        logits = net(rules.image)
    score = rules.settled(logits)[0, target]
    maps, _ = rules.explain(score)
    (held,) = torch.autograd.grad(score, rules._one, allow_unused=True)
    return maps.sum(), 0.0 if held is None else held, score.detach()


def test_all_of_the_score_reaches_the_pixels_without_biases(conv_net, picture):
    for module in (conv_net.body, conv_net.fc1, conv_net.fc2):
        module.bias.zero_()
    for norm in (conv_net.norm, conv_net.norm2):
        norm.bias.copy_(norm.running_mean * norm.weight * (norm.running_var + norm.eps).rsqrt())
    conv_net.fc1 = nn.Identity()
    conv_net.fc2 = nn.Conv2d(4, 5, 2, bias=False).requires_grad_(False)  # no stabiliser either

    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net

        def forward(self, x):
            n = self.net
            x = n.relu(n.norm(n.stem(x)))
            return n.fc2(n.pool(n.act(n.norm2(n.body(x)) + x))).flatten(1)

    reached, held, score = held_and_reached(Convolutional().eval(), picture, 2)
    assert abs(score) > 1e-3
    torch.testing.assert_close(reached, score, rtol=1e-4, atol=1e-6)
    assert abs(float(held)) < 1e-5


FAMILIES = [
    "resnet18",
    "squeezenet1_1",
    "googlenet",
    "densenet121",
    "shufflenet_v2_x0_5",
]


@pytest.mark.parametrize("name", [*FAMILIES, "tf_efficientnet_lite0", "regnet_x_400mf"])
def test_conserves_in_the_families_people_use(name, run):
    from models.compat import define_missing_operators

    define_missing_operators()
    import timm
    import torchvision

    torch.manual_seed(0)
    if name.startswith("tf_"):
        net = timm.create_model(name, num_classes=5)
    else:
        extra = {"init_weights": False, "transform_input": True} if name == "googlenet" else {}
        net = getattr(torchvision.models, name)(num_classes=5, **extra)
    x = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2)) * 4 - 2
    net = frozen(net)
    made = run(net, x, [1])  # refuses by itself what is not conserved
    assert made.maps.shape == (1, 64, 64)
    reached, held, score = held_and_reached(net, x, 1)
    torch.testing.assert_close(reached + held, score, rtol=1e-3, atol=1e-4 * float(score.abs()))


class Gated(nn.Module):
    def __init__(self, gate) -> None:
        super().__init__()
        self.stem, self.gate, self.fc = nn.Conv2d(3, 4, 3, padding=1), gate, nn.Linear(4, 5)

    def forward(self, x):
        x = self.gate(self.stem(x).relu())
        return self.fc(x.mean((2, 3)))


def test_a_model_that_normalises_its_input_is_explained_alike(conv_net, picture):
    """Bounds go through what precedes the first convolution; constants hold no relevance."""

    class Normalising(nn.Module):
        def forward(self, x):
            return conv_net((x - 0.25) / 0.5)

    plain = (picture - 0.25) / 0.5
    expected, held, score = held_and_reached(conv_net, plain, 2, low=-4.5, high=3.5)
    found = held_and_reached(Normalising().eval(), picture, 2)
    torch.testing.assert_close(torch.stack(found), torch.stack([expected, held, score]))
    maps = []
    for net, x, low, high in (
        (conv_net, plain, -4.5, 3.5),
        (Normalising().eval(), picture, LOW, HIGH),
    ):
        rules = rules_of(x, low=low, high=high)
        with rules:
            logits = net(rules.image)
        maps.append(rules.explain(rules.settled(logits)[0, 2])[0])
    assert maps[0].abs().max() > 1e-3
    torch.testing.assert_close(maps[0], maps[1])


@pytest.mark.parametrize("shift", [0.5, torch.tensor([0.1, -0.2, 0.3, 0.9]).view(4, 1, 1)])
def test_constants_that_are_added_hold_relevance_like_biases(shift, run, picture):
    """As in a frozen batch normalisation that is written out."""
    torch.manual_seed(3)
    net = frozen(Gated(lambda x: x * 2 + shift))
    run(net, picture)
    reached, held, score = held_and_reached(net, picture, 2)
    torch.testing.assert_close(reached + held, score)
    assert abs(held) > 1e-3


class Doubling(torch.autograd.Function):
    """No torch function: the mode cannot see that its gradient is not that of its values."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (nn.SiLU(inplace=True), "silu"),
        (nn.GroupNorm(2, 4), "group_norm"),
        (nn.Softmax(1), "softmax"),
        (lambda x: x * x.mean((2, 3), keepdim=True), "products"),
        (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), "sigmoid"),
        (Doubling.apply, "conserve"),
        (lambda x: x.detach(), "conserve"),
    ],
)
def test_refuses_with_the_reason(gate, said, run, picture):
    with pytest.raises(MethodNotApplicable, match=said):
        run(frozen(Gated(gate)), picture)


def test_refuses_what_the_rewritten_pass_computes_otherwise(run, picture):
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(48, 5)

        def forward(self, x):
            x = self.fc(x.flatten(1))
            torch.relu_(x)  # counts on its being in place
            return x

    torch.manual_seed(0)
    with pytest.raises(MethodNotApplicable, match="cannot follow"):
        run(frozen(Careless()), picture)


def test_half_precision_models_are_explained_in_float32(run, conv_net, picture):
    expected = run(conv_net, picture, [2]).maps
    half = conv_net.bfloat16()
    rules = Rules(
        picture[None].bfloat16(),
        low=torch.full((1, 3, 4, 4), LOW),
        high=torch.full((1, 3, 4, 4), HIGH),
    )
    with rules:
        logits = half(rules.image)
    maps, _ = rules.explain(rules.settled(logits)[0, 2])
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, expected[0], rtol=0.1, atol=0.05 * float(expected.abs().max()))


def test_a_deep_network_in_half_precision_may_round(run, picture):
    torch.manual_seed(0)
    deep = [layer for _ in range(100) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5, bias=False)]
    net = frozen(nn.Sequential(nn.Conv2d(3, 8, 1), *deep, *head))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    scores = net(picture[None])
    expected = run(net, picture).maps
    half = net.bfloat16()
    rounded = half(picture[None].bfloat16())
    assert (rounded - scores).abs().max() > 0.02 * scores.abs().max(), "it does not round enough"
    maps = run(half, picture.bfloat16()).maps
    assert np.corrcoef(maps.flatten(), expected.flatten())[0, 1] > 0.8
