"""Wrapped scores are taken out, and probabilities become scores again, never normalised twice."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

from models.errors import ModelLoadFailed
from models.network_proof import prove_network
from models.preparation.variant import fused_variant
from models.probe import probe_batch
from models.targets import class_scores
from models.types import Preprocess
from tests.models.test_network_proof import Net, frozen

SIZE = Preprocess(resize=12, crop=(12, 12))


class Returning(Net):
    def __init__(self, wrap, outputs: int = 4) -> None:
        super().__init__(outputs)
        self.wrap = wrap
        with torch.no_grad():
            self.fc.weight.mul_(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.wrap(super().forward(x))


@dataclass
class Output:
    logits: Tensor


class Pair(NamedTuple):
    logits: Tensor
    aux: Tensor


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda y: (y,), "element 0"),
        (lambda y: [y], "element 0"),
        (lambda y: {"logits": y, "maps": y * 2}, "`logits`"),
        (lambda y: OrderedDict(out=y, aux=y * 2), "`out`"),
        (lambda y: {"scores": y, "loss": None}, "`scores`"),
        (Output, "`logits`"),
        (lambda y: Pair(y, y * 2), "`logits`"),
    ],
)
def test_the_one_tensor_of_scores_is_taken_out(wrap, note):
    proved = prove_network(frozen(Returning(wrap)), SIZE, "single_label")
    images = probe_batch(SIZE)
    torch.testing.assert_close(proved.module(images), Returning(lambda y: y)(images))
    assert proved.notes == (f"The scores are {note} of what the network returns.",)
    # The layers keep their names, and can still be fused.
    assert [name for name, _ in proved.module.named_children()] == ["conv", "fc"]
    variant = fused_variant(proved.module, images)
    assert variant is not None
    torch.testing.assert_close(variant.module(images), proved.module(images))


@pytest.mark.parametrize("wrap", [lambda y: y.squeeze(1), lambda y: y.squeeze()])
def test_a_single_logit_may_come_without_its_dimension(wrap):
    proved = prove_network(frozen(Returning(wrap, outputs=1)), SIZE, "binary")
    images = probe_batch(SIZE)
    for batch in (images, images[:1]):
        expected = Returning(lambda y: y, outputs=1)(batch)
        torch.testing.assert_close(proved.module(batch), expected)


def test_a_compiled_network_cannot_be_adapted():
    traced = fx.symbolic_trace(Returning(lambda y: (y,)))
    with pytest.raises(ModelLoadFailed, match=r"compiled or replaced.*element 0"):
        prove_network(frozen(traced), SIZE, "single_label")


class Ending(Net):
    """A network whose last module, or operation, makes probabilities."""

    def __init__(self, end, outputs: int) -> None:
        super().__init__(outputs)
        self.end = end
        with torch.no_grad():
            self.fc.weight.mul_(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(super().forward(x))


def by_hand(y: Tensor) -> Tensor:
    return y.exp() / y.exp().sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("end", "task", "outputs"),
    [
        (nn.Softmax(1), "single_label", 4),
        (nn.Softmax(1), "binary", 2),
        (nn.LogSoftmax(1), "single_label", 4),
        (nn.Sigmoid(), "multi_label", 4),
        (nn.Sigmoid(), "binary", 1),
        (lambda y: y.softmax(1), "single_label", 4),
        (lambda y: y.log_softmax(1), "single_label", 4),
        (lambda y: y.sigmoid(), "multi_label", 4),
        (lambda y: y.sigmoid(), "binary", 1),
        (lambda y: y.sigmoid().squeeze(1), "binary", 1),
        (by_hand, "single_label", 4),
    ],
)
def test_probabilities_are_normalised_once(end, task, outputs):
    network = Ending(end, outputs)
    images = probe_batch(SIZE)
    logits = Ending(nn.Identity(), outputs)(images)
    probabilities = end(logits)
    proved = prove_network(frozen(network), SIZE, task)
    read = "single_label" if (task, outputs) == ("binary", 2) else task
    _, found = class_scores(proved.module(images), read)
    logarithms = bool((probabilities < 0).any())
    expected = probabilities.exp() if logarithms else probabilities
    expected = expected.reshape(len(images), -1)
    torch.testing.assert_close(found[:, -expected.shape[1] :], expected, rtol=1e-4, atol=1e-6)
    if isinstance(end, nn.Module):
        # The scores are the logits themselves.
        torch.testing.assert_close(proved.module(images), logits)
        assert "left out" in proved.notes[0]
    assert len(proved.notes) == 1


def test_sure_probabilities_keep_finite_scores_and_gradients():
    network = Ending(nn.Sigmoid(), 3)
    with torch.no_grad():
        network.fc.weight.mul_(1e4)
    proved = prove_network(frozen(network), SIZE, "multi_label")
    images = probe_batch(SIZE).requires_grad_()
    scores = proved.module(images)
    assert scores.abs().max().item() > 100
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.any()


@pytest.mark.parametrize(
    ("end", "task", "outputs", "message"),
    [
        (nn.Sigmoid(), "single_label", 4, 'ends in a sigmoid.*task = "multi_label"'),
        (nn.Softmax(1), "multi_label", 4, 'ends in a softmax.*"single_label"'),
        (nn.LogSoftmax(1), "multi_label", 4, 'ends in a log_softmax.*"single_label"'),
        (nn.Sigmoid(), "binary", 2, 'ends in a sigmoid.*task = "multi_label"'),
        (nn.Softmax(1), "binary", 1, "softmax over one score, which is the same"),
        (nn.Softmax(0), "single_label", 4, "other images of a batch"),
    ],
)
def test_probabilities_that_the_task_would_misread(end, task, outputs, message):
    with pytest.raises(ModelLoadFailed, match=message):
        prove_network(frozen(Ending(end, outputs)), SIZE, task)


def test_scores_that_only_look_like_probabilities_stay():
    network = Ending(lambda y: y.relu().clamp(max=1.0), 4)
    proved = prove_network(frozen(network), SIZE, "single_label")
    assert proved.notes == ()


def test_a_softmax_that_is_used_elsewhere_too_stays_in_its_place():
    class Twice(Ending):
        def maps(self, x: Tensor) -> Tensor:
            return self.end(super().maps(x))

    images = probe_batch(SIZE)
    expected = Twice(nn.Softmax(1), 4)(images)
    proved = prove_network(frozen(Twice(nn.Softmax(1), 4)), SIZE, "single_label")
    assert isinstance(proved.module.end, nn.Softmax)
    torch.testing.assert_close(proved.module(images).softmax(1), expected)
