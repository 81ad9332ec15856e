"""FullGrad: its completeness, and its map from gradients of zeros added where biases are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.compat import define_missing_operators
from models.errors import MethodNotApplicable, UnknownLayer
from models.methods._fullgrad import decompose, misplaced, obstacle
from models.methods.gradient import fullgrad
from models.probe import trace
from models.proof import prove_layers
from models.targets import ResolvedTarget

define_missing_operators()
import timm  # noqa: E402  (torchvision's operators come first)
import torchvision  # noqa: E402
from timm.layers import BatchNormAct2d  # noqa: E402


def alive(net: nn.Module) -> nn.Module:
    """Frozen, with random biases and running statistics, as after a training."""
    rng = torch.Generator().manual_seed(7)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=rng)
            module.running_var.uniform_(0.5, 2, generator=rng)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or parameter.ndim == 1:
                nn.init.normal_(parameter, 0.5, 0.3, generator=rng)
    return net.eval().requires_grad_(False)


class Piecewise(nn.Module):
    """Every kind of bias, an activation in a batch-norm, in-place ReLUs, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.wide = nn.Conv2d(4, 6, 1, bias=False)
        self.act = BatchNormAct2d(6)
        self.bare = nn.BatchNorm2d(6, affine=False)
        self.fc = nn.Linear(6, 8)
        self.flat_norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.pool(self.relu(self.twice(self.relu(self.twice(x)))))
        x = self.bare(self.act(self.wide(x))).relu().mean((2, 3))
        return self.out(self.relu(self.flat_norm(self.fc(x))))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return alive(Piecewise())


def assert_complete(net, subject_of, x, targets) -> None:
    subject = subject_of(net, x, targets)
    parts = decompose(subject, subject.targets)
    torch.testing.assert_close(parts.scores, subject.scores(subject.logits[None])[0])
    scale = parts.scores.abs().max()
    assert (parts.total - parts.scores).abs().max() <= 1e-4 * scale


def test_complete_on_a_piecewise_linear_network(net, subject_of, images):
    for x in images:
        assert_complete(net, subject_of, x, [0, 4, ResolvedTarget(2, (1, 3))])


@pytest.mark.parametrize("layer", ["norm", "act", "bare", "flat_norm", "twice", "fc", "out"])
def test_completeness_notices_every_bias(layer, net, subject_of, images, monkeypatch):
    """Guards the test above: without any one of the biases the sum is not the score."""
    from models.methods import _fullgrad

    every = _fullgrad._places

    def all_but_one(module):
        return [p for p in every(module) if p.layer.partition(".")[0] != layer]

    monkeypatch.setattr(_fullgrad, "_places", all_but_one)
    with pytest.raises(AssertionError):
        assert_complete(net, subject_of, images[0], [0, 4])


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "densenet121"])
def test_complete_on_common_networks(name, subject_of):
    torch.manual_seed(1)
    net = alive(getattr(torchvision.models, name)(weights=None, num_classes=10))
    x = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(2))
    assert_complete(net, subject_of, x, [3])


def test_complete_on_timms_batch_norms_with_activations(subject_of):
    torch.manual_seed(1)
    net = alive(timm.create_model("tf_efficientnet_lite0", num_classes=10, act_layer=nn.ReLU))
    x = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(2))
    assert_complete(net, subject_of, x, [3])


def by_added_zeros(net: Piecewise, x: torch.Tensor, target: int) -> torch.Tensor:
    """The map from gradients of zeros added where each bias is, in float64, written out."""
    net, x = net.double(), x.double().requires_grad_()
    zeros: list[tuple[torch.Tensor, torch.Tensor]] = []

    def biased(value, bias):
        zero = torch.zeros_like(value, requires_grad=True)
        zeros.append((zero, bias.view(1, -1, 1, 1)))
        return value + zero

    def normed(norm, value):
        sigma = (norm.running_var + norm.eps).sqrt()
        weight = norm.weight if norm.affine else torch.ones_like(sigma)
        bias = norm.bias if norm.affine else torch.zeros_like(sigma)
        scaled = value * (weight / sigma).view(1, -1, 1, 1)
        implicit = bias - weight * norm.running_mean / sigma
        return biased(scaled + implicit.view(1, -1, 1, 1), implicit)

    h = normed(net.norm, net.stem(x)).relu()
    h = biased(net.twice(h), net.twice.bias).relu()
    h = biased(net.twice(h), net.twice.bias).relu()
    h = net.wide(nn.functional.max_pool2d(h, 2))
    h = normed(net.bare, normed(net.act, h).relu()).relu().mean((2, 3))
    y = net.out(net.flat_norm(net.fc(h)).relu())[0, target]
    dx, *gradients = torch.autograd.grad(y, [x, *[zero for zero, _ in zeros]])
    total = torch.zeros(x.shape[-2:], dtype=torch.float64)
    for part in [dx * x, *[g * b for g, (_, b) in zip(gradients, zeros, strict=True)]]:
        size = part.abs()[0]
        size = (size - size.min()) / (size.max() - size.min())
        for channel in size:
            total += nn.functional.interpolate(
                channel[None, None], total.shape, mode="bilinear", align_corners=False
            )[0, 0]
    return total.detach().float()


def test_map_by_added_zeros(net, subject_of, drive, images):
    subject = subject_of(net, images[1], [2])
    maps = drive(fullgrad(subject), subject)
    expected = by_added_zeros(net, images[1:2], 2)
    torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_targets_in_chunks_and_alone(chunk, net, subject_of, drive, images, untouched):
    subject = subject_of(net, images[0], [0, 1, 2, 3, 4], chunk=chunk)
    with untouched(net):
        maps = drive(fullgrad(subject), subject)
    assert maps.shape == (5, 8, 8)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    at_once = max(1, chunk // 6)
    assert len(drive.taken) == -(-5 // at_once)
    alone = subject_of(net, images[0], [3])
    torch.testing.assert_close(drive(fullgrad(alone), alone)[0], maps[3], rtol=1e-4, atol=1e-5)


def test_networks_with_other_biases_are_refused(subject_of, drive):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 2))
    net.eval().requires_grad_(False)
    assert "GroupNorm" in obstacle(net)
    subject = subject_of(net, torch.randn(3, 8, 8))
    with pytest.raises(MethodNotApplicable, match="GroupNorm"):
        drive(fullgrad(subject), subject)


def test_a_constant_part_counts_as_nothing(subject_of, drive):
    """All values of a layer the same: there is no least and greatest to scale by."""
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.eval().requires_grad_(False)
    net[0].weight.fill_(1.0)
    net[0].bias.fill_(2.0)
    subject = subject_of(net, torch.ones(3, 4, 4))
    assert not drive(fullgrad(subject), subject).any()


class Rearranged(nn.Module):
    """A convolution on what the test makes of an image's patches."""

    def __init__(self, before, after) -> None:
        super().__init__()
        self.embed, self.conv, self.fc = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        self.before, self.after = before, after

    def forward(self, x):
        return self.fc(self.after(self.conv(self.before(self.embed(x)))).mean((2, 3)))


def halves(x):
    """The image's left and right half, as images of their own."""
    return torch.cat(x.chunk(2, 3))


def joined(x):
    return torch.cat(x.chunk(2), 3)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [(halves, joined, "first dimension"), (lambda x: x.mT, lambda x: x.mT, "do not respond")],
)
def test_biases_without_a_place_in_the_image_are_refused(before, after, reason):
    torch.manual_seed(0)
    net = Rearranged(before, after).eval().requires_grad_(False)
    traced = trace(net, "single_label", torch.randn(3, 3, 24, 24))
    found = misplaced(traced, prove_layers(traced))
    assert found.startswith("its layer conv has a bias")
    assert reason in found


def test_positions_that_see_the_whole_image_keep_their_places():
    """Rows stay rows in operations that move nothing, whatever the positions respond to."""
    torch.manual_seed(0)
    far = nn.Conv2d(4, 4, (1, 7), padding=(0, 3))
    with torch.no_grad():
        # Each position sees only what lies three positions away.
        far.weight[..., 1:6] = 0
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), far, nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    net = net.eval().requires_grad_(False)
    traced = trace(net, "single_label", torch.randn(3, 3, 16, 24))
    proofs = prove_layers(traced)
    assert not proofs["1"].spatial
    assert misplaced(traced, proofs) is None


def test_biases_of_common_networks_have_their_place():
    torch.manual_seed(0)
    net = alive(torchvision.models.resnet18(weights=None, num_classes=10))
    traced = trace(net, "single_label", torch.randn(3, 3, 64, 64))
    assert misplaced(traced, prove_layers(traced)) is None


def test_a_bias_that_turns_out_not_to_belong_to_images_ends_the_method(subject_of, drive):
    net = Rearranged(halves, joined).eval().requires_grad_(False)
    subject = subject_of(net, torch.randn(3, 24, 24))
    with pytest.raises(UnknownLayer, match="conv cannot be used"):
        drive(fullgrad(subject), subject)
