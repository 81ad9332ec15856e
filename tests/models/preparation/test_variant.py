"""The fused variant gives the same tensors under the same names, and is refused where it cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.compat import define_missing_operators
from models.engine import Engine
from models.extractor import Extractor, Tap
from models.preparation.convolution import FusedConv2d
from models.preparation.fusion import fuse_convolutions
from models.preparation.variant import Needs, fused_variant
from tests.models.conftest import FlatNet, OneModel, frozen, warm_of
from tests.models.preparation.conftest import warm
from tests.models.test_engine import assert_same, job


class Residual(nn.Module):
    """A block with every pattern: conv-bn-relu, one ReLU used twice, a residual sum."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(width, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=1), nn.BatchNorm2d(6), nn.SiLU()
        )
        self.stage = nn.Sequential(Residual(), nn.Dropout(), Residual())
        self.last = nn.Conv2d(6, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.Hardswish()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.act(self.norm(self.last(self.stage(self.stem(x))))).mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(4)
    made = Net()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return frozen(made)


@pytest.fixture
def probe() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def test_every_convolution_is_fused_and_the_answer_stays(net, probe):
    before = copy.deepcopy(net.state_dict())
    variant = fused_variant(net, probe)
    assert variant is not None
    assert variant.step == "6 fused convolutions"
    assert not any(isinstance(m, nn.BatchNorm2d) for m in variant.module.modules())
    with torch.inference_mode():
        torch.testing.assert_close(variant.module(probe), net(probe), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_layers_keep_their_names_where_their_tensors_are_the_same(net, probe):
    variant = fused_variant(net, probe)
    kept = frozenset({"stem", "stem.2", "stage", "stage.0", "stage.2", "act", "fc"})
    assert variant.serves(Needs(reads=kept, rewrites=kept, input_gradient=True))
    for inside in (
        "stem.0",
        "stem.1",
        "stage.0.conv1",
        "stage.0.bn1",
        "stage.0.relu",
        "last",
        "norm",
    ):
        assert not variant.serves(Needs(reads=frozenset({inside})))
        assert not variant.serves(Needs(rewrites=frozenset({inside})))


def test_inputs_of_layers_are_the_models_own():
    net = frozen(FlatNet())
    model = warm(net)
    assert model.variants
    # The input of a ReLU that was fused away is not that of the fused convolution in its place.
    jobs = [job("inputs", "features", layers=("out",), kinds=("input",))]
    found, expected = (
        Engine(OneModel(m)).run(jobs)[0].statistics[0] for m in (model, warm_of(net))
    )
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


def test_explaining_on_the_twin_equals_explaining_the_original(net, probe):
    variant = fused_variant(net, probe)
    for layer in ("stem", "stage.0", "act"):
        caught = []
        for module in (net, variant.module):
            taps = [Tap(layer, "output"), Tap(layer, "grad_output")]
            with Extractor(module, taps) as extractor:
                extractor.backward(extractor.forward(probe)[:, 1].sum())
                caught.append([extractor.caught(layer, k) for k in ("output", "grad_output")])
        for a, b in zip(*caught, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_input_gradients_flow_through_the_twin(net, probe):
    variant = fused_variant(net, probe)
    gradients = []
    for module in (net, variant.module):
        leaf = probe.clone().requires_grad_()
        gradients.append(torch.autograd.grad(module(leaf)[:, 0].sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_other_batch_sizes_than_the_packed_one(net, probe):
    variant = fused_variant(net, probe)
    for n in (1, 2, 7):
        x = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))
        with torch.inference_mode():
            torch.testing.assert_close(variant.module(x), net(x), rtol=1e-4, atol=1e-5)


def test_bfloat16_after_packing_in_float32(net, probe):
    variant = fused_variant(net, probe)
    module = variant.module.to(torch.bfloat16)
    with torch.inference_mode():
        found = module(probe.bfloat16()).float()
        cosine = nn.functional.cosine_similarity(found, net(probe))
    assert cosine.min() > 0.99


class SharedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((self.act(self.conv(x)) + self.conv(x)).mean((2, 3)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv(x)
        return self.fc((self.act(out) - out).mean((2, 3)))


class Untraceable(SharedConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act(self.conv(x))
        return self.fc(out.mean((2, 3)) if x.sum() > 0 else out.amax((2, 3)))


@pytest.mark.parametrize("kind", [SharedConv, Branching, Untraceable])
def test_what_does_not_fit_the_pattern_stays(kind, probe):
    net = frozen(kind())
    assert fuse_convolutions(copy.deepcopy(net))[1] == 0
    assert fused_variant(net, probe) is None


def test_a_convolution_without_norm_takes_its_activation(images):
    variant = fused_variant(frozen(FlatNet()), images)
    assert variant.step == "2 fused convolutions"
    assert isinstance(variant.module.get_submodule("out"), FusedConv2d)


def test_a_twin_that_answers_differently_is_refused(net, probe, monkeypatch):
    def broken(
        self: FusedConv2d, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        return 1.01 * nn.functional.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    monkeypatch.setattr(FusedConv2d, "forward", broken)
    assert fused_variant(net, probe) is None


def test_a_twin_that_loses_a_gradient_is_not_differentiated(net, probe, monkeypatch):
    plain = FusedConv2d._run_plain

    def forgetful(self: FusedConv2d, x, residual):
        return plain(self, x, None if residual is None else residual.detach())

    monkeypatch.setattr(FusedConv2d, "_run_plain", forgetful)
    variant = fused_variant(net, probe)
    assert "stem" in variant.readable
    assert "stem" not in variant.rewritable, "its gradient passes the residual sum"
    assert {"act", "fc"} <= variant.rewritable
    assert not variant.differentiable


def test_a_twin_with_other_values_where_a_graph_is_made_is_not_differentiated(
    net, probe, monkeypatch
):
    plain = FusedConv2d._run_plain
    monkeypatch.setattr(FusedConv2d, "_run_plain", lambda *args: 1.01 * plain(*args))
    variant = fused_variant(net, probe)
    assert "act" in variant.readable
    assert not variant.rewritable


class Same(nn.Module):
    """A TensorFlow-like convolution, as timm builds it."""

    def __init__(self, stride: int, kernel: int, groups: int) -> None:
        super().__init__()
        define_missing_operators()
        from timm.layers import Conv2dSame

        self.conv = Conv2dSame(6, 6, kernel, stride=stride, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_of_every_parity(stride, kernel, groups):
    torch.manual_seed(0)
    net = frozen(Same(stride, kernel, groups))
    variant, fused = fuse_convolutions(copy.deepcopy(net))
    assert fused == 1
    for height, width in ((12, 12), (13, 13), (12, 13), (7, 10), (12, 12)):
        x = torch.randn(2, 6, height, width)
        with torch.inference_mode():
            torch.testing.assert_close(variant(x), net(x), rtol=1e-4, atol=1e-5)
