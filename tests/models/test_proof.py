"""What each layer may be used for, on networks made to mislead: found at load, used by the engine."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.engine import Engine
from models.errors import ModelLoadFailed
from models.layers import TokenLayout
from models.probe import probe_batch, trace
from models.proof import NOT_THE_IMAGE, input_layouts, layouts_of, prove_layers
from models.types import Failure, Intervention, Preprocess, Target
from tests.models.conftest import OneModel, PoolNet, frozen
from tests.models.preparation.conftest import blocks, warm
from tests.models.test_engine import assert_same, finish, index, job, normalised


def proved(net: nn.Module, *, crop: tuple[int, int] = (32, 32)):
    found = trace(frozen(net), "single_label", probe_batch(Preprocess(resize=32, crop=crop)))
    return found, prove_layers(found)


class Through(nn.Module):
    """A convolution, one step of a test's own with a module to name it, and a linear head."""

    def __init__(self, step, *, patch: int = 4, channels: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, channels, patch, patch)
        self.step, self.named = step, nn.Hardtanh(-9.0, 9.0)
        self.fc = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.named(self.step(self.embed(x))).reshape(len(x), -1))


def through(step, *, crop: tuple[int, int] = (32, 32), **options) -> Through:
    torch.manual_seed(0)
    net = Through(step, **options)
    net(torch.zeros(1, 3, *crop))
    return net


# ---------------------------------------------------------------- the first dimension


class Table(nn.Module):
    """A table of positions: as many rows as it likes, and nothing of the image in it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 6)
        self.conv, self.fc = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)) + self.table(torch.arange(self.rows)).mean(0))


@pytest.mark.parametrize("rows", [2, 3, 10])
def test_a_table_is_no_batch_even_if_its_size_is(rows):
    _, proofs = proved(Table(rows))
    assert (proofs["table"].usable, proofs["table"].reason) == (False, NOT_THE_IMAGE)
    assert proofs["conv"].spatial


def test_tensors_that_begin_with_the_position_are_refused():
    _, proofs = proved(through(lambda x: x.flatten(2).permute(2, 0, 1)))
    assert not proofs["named"].usable


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def test_values_that_depend_on_the_other_images_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), Centred(), nn.Flatten(), nn.Linear(256, 5))
    _, proofs = proved(net)
    assert proofs["0"].usable
    assert not proofs["1"].usable


class Windows(nn.Module):
    """A module that takes windows of the images and returns images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.inner(x).chunk(2), 1)


class Windowed(PoolNet):
    def __init__(self) -> None:
        super().__init__()
        self.windows = Windows()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(self.act(self.stem(x))).flatten(2).mT
        return self.fc(self.windows(torch.cat(tokens.chunk(2, 1))).mean(1))


def test_layers_between_windows_are_used_for_what_belongs_to_one_image():
    torch.manual_seed(0)
    model = warm(frozen(Windowed()))
    engine = Engine(OneModel(model))
    change = (Intervention(layer="windows.inner", channels=(0,), op="scale", value=50.0),)
    plain = job("plain", "predict", seed=1)
    (alone,) = finish(engine, [plain])
    beside, *refused, kept = finish(
        engine,
        [
            plain,
            job("a", "predict", interventions=change),
            job("b", "features", layers=("windows.inner",)),
            job("c", "features", layers=("windows",), kinds=("input",)),
            job("d", "features", layers=("windows",)),
        ],
    )
    assert_same(beside.predictions, alone.predictions)
    assert [type(one) for one in refused] == [Failure] * 3
    assert all("first dimension" in one.message for one in refused)
    assert kept.statistics[0].shape == (16, 6)


# ---------------------------------------------------------------- maps


def test_shuffled_tokens_are_no_map_and_tokens_in_order_are():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for permutation, spatial in ((torch.arange(64), True), (order, False)):
        _, proofs = proved(through(lambda x, p=permutation: x.flatten(2).mT[:, p]))
        assert proofs["named"].usable
        assert proofs["named"].spatial is spatial


@pytest.mark.parametrize("channels", [4, 8, 32, 48])
@pytest.mark.parametrize("patch", [4, 8])
def test_a_transposed_map_is_none(channels, patch):
    for seed in range(4):
        torch.manual_seed(seed)
        net = through(lambda x: x.mT, patch=patch, channels=channels, crop=(48, 48))
        _, proofs = proved(net, crop=(48, 48))
        assert not proofs["named"].spatial
        assert proofs["embed"].spatial


@pytest.mark.parametrize(("before", "behind"), [(1, 0), (0, 1), (5, 0), (1, 4), (2, 2)])
def test_tokens_without_a_place_may_stand_on_both_sides(before, behind):
    torch.manual_seed(0)
    first, last = torch.randn(1, before, 6), torch.randn(1, behind, 6)
    mix = nn.Linear(64 + before + behind, 64 + before + behind)

    class Mixed(Through):
        def __init__(self) -> None:
            super().__init__(lambda x: x)
            self.joined, self.mixed = nn.LayerNorm(6), nn.Hardtanh(-9.0, 9.0)

        def forward(self, x: Tensor) -> Tensor:
            tokens = [t.expand(len(x), -1, -1) for t in (first, last)]
            x = torch.cat([tokens[0], self.embed(x).flatten(2).mT, tokens[1]], 1)
            x = self.joined(x)
            return self.fc(self.mixed(x + mix(x.mT).mT).flatten(1))

    net = Mixed()
    net(torch.zeros(1, 3, 32, 32))
    layouts = layouts_of(proved(net)[1])
    layout = TokenLayout(grid=(8, 8), prefix=before)
    assert (layouts["joined"], layouts["mixed"]) == (layout, layout)
    tokens = torch.arange(64.0 + before + behind)[None, :, None]
    assert layout.to_map(tokens).flatten().tolist() == [before + i for i in range(64)]


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_a_mirrored_map_is_none_however_few_positions_it_has(patch):
    _, proofs = proved(through(lambda x: x.flip(3), patch=patch))
    assert proofs["embed"].spatial
    assert proofs["named"].usable
    assert not proofs["named"].spatial


def test_more_images_are_asked_where_one_leaves_doubt():
    torch.manual_seed(1)
    wide = nn.Conv2d(6, 6, 5, padding=2)
    net = nn.Sequential(nn.Conv2d(3, 6, 8, 8), wide, nn.Flatten(), nn.Linear(96, 5))
    passes: list[int] = []
    net.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    proved(net)
    assert passes == [3, 10, 10, 10]
    passes.clear()
    plain = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Flatten(), nn.Linear(384, 5))
    plain.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    proved(plain)
    assert passes == [3, 10]


def test_a_map_may_be_finer_in_one_direction():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3, stride=(2, 1), padding=1)
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    _, proofs = proved(net)
    assert proofs["0"].spatial
    assert proofs["0"].layout is None


def test_channels_last_and_tokens_of_later_stages_are_found():
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 8, 2, 2)
            self.tokens, self.last, self.fc = nn.Identity(), nn.Identity(), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.tokens(self.first(x).flatten(2).mT)
            x = self.second(x.mT.unflatten(2, (8, 8)))
            return self.fc(self.last(x.permute(0, 2, 3, 1)).mean((1, 2)))

    torch.manual_seed(0)
    layouts = layouts_of(proved(Stages())[1])
    assert layouts["tokens"] == TokenLayout(grid=(8, 8))
    assert layouts["last"] == TokenLayout(grid=(4, 4), channels_last=True)


def test_an_input_is_read_in_its_own_layout():
    found, proofs = proved(through(lambda x: x.flatten(2).mT))
    # A view of the convolution's output, but its channels are last.
    assert input_layouts(found, layouts_of(proofs))["named"] == TokenLayout(grid=(8, 8))
    net = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(384, 5))
    found, proofs = proved(net)
    assert input_layouts(found, layouts_of(proofs))["1"] is None


# ---------------------------------------------------------------- several calls


class Shared(PoolNet):
    """One activation module after every convolution, as in the residual networks of torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ELU(inplace=True)
        self.fc = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.body(self.act(self.stem(x)))).flatten(1))


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(1)
    net = frozen(Shared())
    return net, warm(net)


def both_calls(net: nn.Module, item, target: int) -> list[tuple[Tensor, Tensor]]:
    """Values and gradient of both calls of `act`, by hand in float64."""
    net = copy.deepcopy(net).double()
    first = nn.functional.elu(net.stem(normalised(item).double())).requires_grad_()
    second = nn.functional.elu(net.body(first))
    gradients = torch.autograd.grad(net.fc(second.flatten(1))[0, target], [first, second])
    return list(zip((first.detach(), second.detach()), gradients, strict=True))


def test_each_call_of_a_module_is_a_layer_of_its_own(shared):
    net, model = shared
    item = job("a", layers=("act#1", "act#2"), methods=("hirescam", "shapleycam", "ablationcam"))
    outcome = finish(Engine(OneModel(model)), [item])[0]
    for explanation in outcome.explanations[:2]:
        call = int(explanation.layer[-1])
        values, gradient = both_calls(net, item, outcome.predictions[0].class_id)[call - 1]
        expected = (values * gradient).sum(1).relu()[0]
        np.testing.assert_allclose(explanation.map, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert [e.map.shape for e in outcome.explanations] == [(8, 8), (4, 4)] * 3


def test_each_call_is_described(shared):
    net, model = shared
    kinds = ("input", "output", "grad_output", "grad_input")
    options = {"layers": ("act#1", "act#2"), "kinds": kinds, "targets": (Target(cls=index(1)),)}
    item = job("a", "features", **options)
    found = {(s.layer, s.kind): s for s in finish(Engine(OneModel(model)), [item])[0].statistics}
    assert len(found) == 8
    for call, (values, gradient) in enumerate(both_calls(net, item, 1), 1):
        slope = torch.where(values > 0, 1.0, values + 1)
        assert found[f"act#{call}", "output"].l2 == pytest.approx(float(values.norm()), rel=1e-4)
        for kind, right in (("grad_output", gradient), ("grad_input", gradient * slope)):
            assert found[f"act#{call}", kind].l2 == pytest.approx(float(right.norm()), rel=1e-4)


def test_each_call_is_changed(shared):
    net, model = shared
    change = Intervention(layer="act#1", channels=(2,), op="zero")
    item = job("a", "predict", interventions=(change,))
    found = finish(Engine(OneModel(model)), [item])[0]
    first = nn.functional.elu(net.stem(normalised(item)))
    first[:, 2] = 0
    scores = net.fc(nn.functional.elu(net.body(first)).flatten(1))[0]
    expected = dict(enumerate(scores.tolist()))
    assert {p.class_id: p.score for p in found.predictions} == pytest.approx(expected, rel=1e-4)


def test_one_call_may_be_the_target(shared):
    net, model = shared
    assert model.target_layer == "act#2"
    configured = warm(net, target_layer="act#1")
    assert finish(Engine(OneModel(configured)), [job("a", layers=("act#1",))])[0].explanations
    with pytest.raises(ModelLoadFailed, match="act#1 to act#2"):
        warm(net, target_layer="act")


@pytest.mark.parametrize("kinds", [("output",), ("grad_output",)])
def test_the_bare_name_is_refused_with_the_names_of_the_calls(shared, kinds):
    model = shared[1]
    layer = next(item for item in model.info.layers if item.name == "act")
    assert (layer.calls, layer.usable) == (2, False)
    unclear = (job("a", layers=("act",)), job("b", "features", layers=("act",), kinds=kinds))
    *found, beside = finish(Engine(OneModel(model)), [*unclear, job("c", layers=("act#2",))])
    for failure in found:
        assert isinstance(failure, Failure)
        assert "act#1 to act#2" in failure.message
    assert not isinstance(beside, Failure), "its neighbour is answered"


# ---------------------------------------------------------------- what the engine makes of it


def gradient_at(net: nn.Module, layer: str, item, target: int) -> tuple[Tensor, Tensor]:
    """A layer's output and gradient by float64 autograd, the layer cut off from what precedes it."""
    net = net.double()
    cut: list[Tensor] = []

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        cut.append(output.detach().requires_grad_())
        return cut[0].clone()

    handle = net.get_submodule(layer).register_forward_hook(hook)
    scores = net(normalised(item).double())
    handle.remove()
    return cut[0].detach(), torch.autograd.grad(scores[0, target], cut[0])[0]


def test_a_branch_that_is_added_to_a_fused_convolution_has_its_gradient():
    class Residual(PoolNet):
        def __init__(self) -> None:
            super().__init__(inplace=False)
            self.down = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6))
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            x = self.out(self.norm(self.body(x)) + self.down(x))
            return self.fc(self.pool(x).flatten(1))

    torch.manual_seed(4)
    net = frozen(Residual())
    item = job("a", layers=("down",), methods=("hirescam",), targets=(Target(cls=index(2)),))
    model = warm(net)
    outcome = finish(Engine(OneModel(model)), [item])[0]
    maps, gradient = gradient_at(net, "down", item, 2)
    expected = (maps * gradient).sum(1)[0].relu()
    np.testing.assert_allclose(outcome.explanations[0].map, expected.numpy(), atol=1e-5)


def test_the_cam_of_another_layer_than_the_heads_is_refused():
    found = finish(
        Engine(OneModel(warm(blocks()))),
        [job("a", methods=("cam",), layers=("block",)), job("b", methods=("cam",))],
    )
    assert isinstance(found[0], Failure)
    assert not isinstance(found[1], Failure)


def test_the_gradient_of_a_sum_over_positions_is_described_right():
    class SumPool(PoolNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.out(self.body(self.act(self.stem(x)))).sum((2, 3)))

    torch.manual_seed(5)
    net = frozen(SumPool())
    item = job(
        "a",
        "features",
        layers=("out",),
        kinds=("grad_output",),
        channels=6,
        targets=(Target(cls=index(2)),),
    )
    (found,) = finish(Engine(OneModel(warm(net))), [item])[0].statistics
    weights = net.fc.weight[2]
    assert found.max == pytest.approx(float(weights.max()), rel=1e-4)
    for channel in found.top_channels:
        assert channel.max == pytest.approx(float(weights[channel.index]), rel=1e-4)


def test_the_gradient_of_an_input_is_the_same_alone_and_beside_other_kinds():
    item = {"layers": ("body",), "targets": (Target(cls=index(1)),)}
    alone = job("a", "features", kinds=("grad_input",), **item)
    both = job("b", "features", kinds=("grad_input", "grad_output", "input"), **item)
    engine = Engine(OneModel(warm(blocks())))
    first, second = (finish(engine, [one])[0] for one in (alone, both))
    of_both = [s for s in second.statistics if s.kind == "grad_input"]
    assert len(first.statistics) == len(of_both) == 1
    assert first.statistics[0].mean == pytest.approx(of_both[0].mean, rel=1e-5)
    assert first.statistics[0].l2 == pytest.approx(of_both[0].l2, rel=1e-5)


def test_few_tokens_are_no_map_if_their_order_was_lost_before():
    class Unrolled(nn.Module):
        """Tokens in groups of 2 x 2, as Hiera has them, and a pool over each group."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.unroll = nn.Conv2d(3, 6, 4, 4), nn.Hardtanh(-9.0, 9.0)
            self.stage, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            groups = self.embed(x).unflatten(3, (2, 2, 2)).unflatten(2, (2, 2, 2))
            tokens = self.unroll(groups.permute(0, 4, 7, 3, 6, 2, 5, 1).flatten(1, 6))
            return self.fc(self.stage(tokens.unflatten(1, (4, 16)).amax(1)).mean(1))

    torch.manual_seed(0)
    _, proofs = proved(Unrolled())
    assert not proofs["unroll"].spatial
    assert not proofs["stage"].spatial


@pytest.mark.filterwarnings("ignore")
def test_layers_of_quantised_tensors_are_refused_and_the_network_is_served():
    class Quantised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.quantize_per_tensor(x, 0.05, 128, torch.quint8)

    net = nn.Sequential(Quantised(), nn.Flatten(), nn.Identity())
    net[2].forward = lambda x: x.dequantize()[:, :5]
    _, proofs = proved(net)
    assert [proofs[name].usable for name in "012"] == [False, False, True]
    assert "quantised" in proofs["0"].reason
