"""Which methods a model's facts allow, and why those that are tried at load refuse a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.compat import define_missing_operators
from models.methods import METHODS
from models.methods.applicability import (
    ModelFacts,
    method_support,
    supported_methods,
    try_methods,
)
from models.probe import trace
from models.proof import prove_layers

define_missing_operators()
import torchvision  # noqa: E402  (its operators come first)

GAP_LINEAR = ModelFacts(target_layer="layer4", head="gap_linear", closed_form=True)
FLATTEN = ModelFacts(target_layer="features", head="flatten", closed_form=False)
NO_MAP = ModelFacts(target_layer=None, head=None, closed_form=False)
GUIDED = {"guided_backprop", "guided_gradcam"}
ATTENTION = {name for name, row in METHODS.items() if row.family == "transformer"}


def test_every_method_has_a_row_in_the_tables_order():
    for facts in (GAP_LINEAR, FLATTEN, NO_MAP):
        assert [row.name for row in supported_methods(facts)] == list(METHODS)


@pytest.mark.parametrize("facts", [GAP_LINEAR, FLATTEN, NO_MAP])
def test_a_reason_is_given_exactly_where_a_method_does_not_apply(facts):
    for row in supported_methods(facts):
        assert row.applicable == (row.reason is None)
        if row.reason:
            # It is put after "gradcam cannot explain vgg11: " and before a full stop.
            assert row.reason[0].islower()
            assert not row.reason.endswith(".")


def test_cam_needs_the_proved_closed_form():
    assert method_support(METHODS["cam"], GAP_LINEAR).applicable
    assert "global average pooling" in method_support(METHODS["cam"], FLATTEN).reason


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_that_explain_a_layer_need_a_map(name):
    layered = METHODS[name].family in ("gradient", "activation") or "cam" in name
    reason = method_support(METHODS[name], NO_MAP).reason
    assert layered == (reason is not None and "map of the image" in reason)


def test_gradient_methods_need_no_particular_head():
    for name in ("gradcam", "gradcam_plus_plus", "xgradcam", "hirescam", "layercam"):
        assert method_support(METHODS[name], FLATTEN).applicable


# ---------------------------------------------------------------- trials


class Silu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(nn.functional.silu(self.stem(x)).mean((2, 3)))


def reasons_of(net: nn.Module, side: int, task: str = "single_label") -> dict[str, str]:
    net = net.eval().requires_grad_(False)
    probe = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    traced = trace(net, task, probe)
    return try_methods(traced, prove_layers(traced), task=task)


def test_relu_networks_refuse_attention_only(pool_net, flat_net):
    assert set(reasons_of(pool_net, 8)) == ATTENTION
    assert set(reasons_of(flat_net, 8)) == ATTENTION | {"lrp"}  # its head ends in a tanh


def test_single_logits(pool_net):
    pool_net.fc = nn.Linear(6, 1).requires_grad_(False)
    assert set(reasons_of(pool_net, 8, "binary")) == ATTENTION


def test_other_rectifiers():
    found = reasons_of(Silu(), 8)
    assert set(found) == ATTENTION | GUIDED | {"lrp"}
    assert found["lrp"] == "relevance has no conserving rule for silu here"
    assert "SiLU" in found["guided_backprop"]


def test_transformers():
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    found = reasons_of(net, 16)
    assert set(found) == GUIDED | {"lrp", "fullgrad"}
    assert "LayerNorm" in found["fullgrad"]


class Shared(list):
    """A list that copies of a network share."""

    def __deepcopy__(self, memo):
        return self


class Seen(nn.Module):
    """Notes the sizes of the pictures that a network is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.sides = net, Shared()

    def forward(self, x):
        self.sides.append(x.shape[-1])
        return self.net(x)


def test_relevance_is_tried_on_a_small_picture(pool_net):
    net = Seen(pool_net)
    assert "lrp" not in reasons_of(net, 200)
    assert net.sides == [200, 200, 96, 96]  # traced, proved, scored, explained


def test_relevance_is_tried_on_a_whole_picture_where_the_model_takes_no_other(flat_net):
    net = Seen(flat_net)
    assert "tanh" in reasons_of(net, 8)["lrp"]
    # Traced, proved by one image and by several, tried small, scored, explained.
    assert net.sides == [8, 8, 8, 96, 8, 8]


def test_methods_of_gradients_are_not_tried_where_none_reaches_the_picture(pool_net):
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pool_net

        def forward(self, x):
            return self.net(x.detach())

    net = Seen(Detached())
    assert set(reasons_of(net, 8)) == ATTENTION
    assert net.sides == [8, 8, 8]  # traced, proved by one image and by several


@pytest.mark.parametrize("net", [Silu(), nn.Sequential(nn.Flatten(), nn.Linear(192, 5))])
def test_reasons_are_clauses_and_nothing_is_left(net, untouched):
    net.eval().requires_grad_(False)
    with untouched(net):
        found = reasons_of(net, 8)
    for reason in found.values():
        assert reason[0].islower()
        assert not reason.endswith(".")
