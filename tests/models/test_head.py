"""The head probe against float64 autograd, and cases in which the closed form must be refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from models.head import probe_head
from models.layers import TokenLayout, to_map
from models.probe import probe_batch
from models.targets import class_scores
from models.types import Preprocess

PROBE = probe_batch(Preprocess(resize=8, crop=(8, 8)))


class Backbone(nn.Module):
    """A convolution and an in-place activation, then what the test appends."""

    def __init__(self, *after: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.act = nn.ReLU(inplace=True)
        self.after = nn.Sequential(*after)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.act(self.conv(x)))


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def autograd(module: nn.Module, layer: str, layout: TokenLayout | None, task: str) -> Tensor:
    """(classes, N, C, h, w) by plain float64 autograd through the whole network."""
    module = copy.deepcopy(module).double()
    kept = []
    handle = module.get_submodule(layer).register_forward_hook(lambda *a: kept.append(a[2]))
    scores, _ = class_scores(module(PROBE.double().requires_grad_()), task)
    handle.remove()
    return torch.stack(
        [
            to_map(torch.autograd.grad(scores[:, c].sum(), kept[-1], retain_graph=True)[0], layout)
            for c in range(scores.shape[1])
        ]
    )


def probed(module: nn.Module, layer: str = "act", layout=None, task: str = "single_label"):
    return probe_head(frozen(module), layer, layout=layout, task=task, probe=PROBE)


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class MeanOfPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2))


POOL = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("after", "layer", "layout", "task"),
    [
        ((*POOL, nn.Linear(6, 11)), "act", None, "single_label"),
        ((*POOL, nn.Dropout(), nn.Linear(6, 3, bias=False)), "act", None, "multi_label"),
        ((*POOL, nn.Linear(6, 1)), "act", None, "binary"),
        ((nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.Flatten()), "act", None, "single_label"),
        (
            (ChannelsLast(), nn.LayerNorm(6), MeanOfPositions(), nn.Linear(6, 4)),
            "after.1",
            TokenLayout(grid=(4, 4), channels_last=True),
            "single_label",
        ),
    ],
)
def test_the_closed_form_is_what_float64_autograd_gives(after, layer, layout, task):
    module = Backbone(*after)
    head = probed(module, layer, layout, task)
    assert (head.kind, head.closed_form) == ("gap_linear", True)
    gradient = autograd(module, layer, layout, task)
    classes, _, channels, height, width = gradient.shape
    assert head.weight.shape == (classes, channels)
    expected = (head.weight.double() / (height * width))[:, None, :, None, None]
    torch.testing.assert_close(gradient, expected.expand_as(gradient), rtol=1e-5, atol=1e-9)
    assert (head.bias is None) == (getattr(after[-1], "bias", 0) is None)


def test_the_closed_form_sums_to_the_scores():
    module = Backbone(*POOL, nn.Linear(6, 5))
    head = probed(module)
    pooled = module.act(module.conv(PROBE)).mean((2, 3))
    torch.testing.assert_close(pooled @ head.weight.T + head.bias, module(PROBE))


def test_one_logit_weighs_its_two_classes_oppositely():
    linear = nn.Linear(6, 1)
    head = probed(Backbone(*POOL, linear), task="binary")
    assert torch.equal(head.weight, torch.cat([-linear.weight, linear.weight]))
    assert torch.equal(head.bias, torch.cat([-linear.bias, linear.bias]))


class LeakyEnd(nn.Module):
    """Linear scores except for the last class, which is bent."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -1:].tanh()], 1)


class Bypass(nn.Module):
    """Pools something else, too: the gradient is W[c]/Z all the same, the scores are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(3, 6, 3), nn.ReLU()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        return self.head(self.act(features).mean((2, 3)) + features.mean((2, 3)))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (Backbone(*POOL, nn.Linear(6, 8), nn.Hardswish(), nn.Linear(8, 5)), "gap"),
        (Backbone(*POOL, nn.LayerNorm(6), nn.Linear(6, 5)), "gap"),
        (Backbone(*POOL, nn.Linear(6, 40), LeakyEnd()), "gap"),
        (Backbone(nn.Conv2d(6, 5, 1), *POOL), "gap"),
        (Bypass(), "gap"),
        (Backbone(nn.Flatten(), nn.Linear(96, 5)), "flatten"),
        (Backbone(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 5)), "flatten"),
        # The activation after the layer decides by position; its in-place form must not spoil the
        # probe.
        (Backbone(nn.Threshold(0.3, 0.0, inplace=True), *POOL, nn.Linear(6, 5)), "flatten"),
        (Backbone(nn.Conv2d(6, 5, 1), nn.ReLU(), *POOL), "flatten"),
    ],
)
def test_no_closed_form_without_proof(module, kind):
    head = probed(module)
    assert (head.kind, head.closed_form, head.weight) == (kind, False, None)


class ReadAtOneToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(self.attention(tokens, tokens, tokens)[0][:, 0])


def test_tokens_that_are_not_averaged():
    layout = TokenLayout(grid=(4, 4))
    assert probed(ReadAtOneToken(), "norm", layout).kind == "token"


def test_a_layer_without_any_gradient_is_not_constant():
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Conv2d(3, 4, 1)
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(x).mean((2, 3)) * 0)

    assert probed(Dead()).kind == "flatten"


def test_the_probe_leaves_no_hook_and_no_gradient():
    module = Backbone(*POOL, nn.Linear(6, 5))
    state = copy.deepcopy(module.state_dict())
    probed(module)
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
