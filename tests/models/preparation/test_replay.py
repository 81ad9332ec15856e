"""Layers of a replay take hooks as the model's own do."""

from __future__ import annotations

import pytest
import torch

from models.extractor import Extractor, Tap
from models.head import HeadProbe
from models.preparation.replay import LayerOutputs, PooledHead, Reference, Refused, Replay
from tests.models.preparation.conftest import SIDE, blocks

LAYERS = ("block.2", "block", "body", "out")


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    return blocks()


@pytest.fixture
def head(net) -> PooledHead:
    return PooledHead(layer="out", layout=None, weight=net.fc.weight, bias=net.fc.bias)


def zero_a_channel(_module, _args, output):
    changed = output.clone()
    changed[:, 1] = 0
    return changed


@pytest.mark.parametrize("changes", [[], [("out", zero_a_channel)]])
def test_values_and_gradients_are_the_models(net, head, pictures, changes):
    taps = [Tap(layer, "output") for layer in LAYERS] + [Tap("out", "grad_output")]
    caught = []
    for module in (
        net,
        Replay(LayerOutputs(net, LAYERS), dict(zip(LAYERS, range(len(LAYERS)), strict=True)), head),
    ):
        with Extractor(module, taps, changes=changes) as extractor:
            scores = extractor.forward(pictures)
            extractor.backward(scores[:, 2].sum())
            caught.append(
                [scores.detach(), *(extractor.caught(tap.layer, tap.kind) for tap in taps)]
            )
        assert not any(m._forward_hooks for m in module.modules())
    for a, b in zip(*caught, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_called_twice_are_not_offered(net, head, pictures):
    forward = net.forward
    net.forward = lambda x: forward(net.act(x))
    reference = Reference(
        net, (pictures, net(pictures)), head=head, features=("act", "block", "out")
    )
    assert reference.outputs == ["out", "block"]


def test_a_backbone_with_other_tensors_is_refused(net, head, pictures):
    reference = Reference(net, (pictures, net(pictures)), head=head, features=())
    backbone = LayerOutputs(net, ["out"])
    variant = reference.variant(backbone, 1, exact=True, step="as it is")
    assert variant.readable == variant.rewritable == {"out"}
    for wrong in (
        lambda x: [1.01 * backbone(x)[0]],
        lambda x: [backbone(x)[0].flip(-1).cumsum(-1)],
    ):
        with pytest.raises(Refused, match="differ from torch's"):
            reference.variant(wrong, 1, exact=True, step="wrong")


def test_the_layers_tensor_must_be_right_even_where_the_scores_are(net, head, pictures):
    reference = Reference(net, (pictures, net(pictures)), head=head, features=())
    with pytest.raises(Refused, match="its tensors at out differ"):
        # Flipped maps have the same means.
        reference.variant(
            lambda x: [LayerOutputs(net, ["out"])(x)[0].flip(-1)], 1, exact=True, step=""
        )


def test_a_head_that_was_not_proved_is_refused():
    with pytest.raises(Refused, match="not pooling and one linear layer"):
        PooledHead.of(HeadProbe(kind="gap"), layer="out", layout=None, outputs=5)
