"""Networks are proved when they are loaded: those that cannot be served are told why."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.errors import ModelLoadFailed, cause_of
from models.fingerprint import Fingerprint
from models.network_proof import prove_network
from models.probe import probe_batch
from models.types import Preprocess

SIZE = Preprocess(resize=12, crop=(12, 12))


class Net(nn.Module):
    """A small network; `change` alters what lies between its maps and its classifier."""

    def __init__(self, outputs: int = 4, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 8, 3, stride=2)
        self.fc = nn.Linear(8, outputs)

    def maps(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))

    def change(self, maps: Tensor) -> Tensor:
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.change(self.maps(x)).mean((2, 3)))


class BatchStatistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def change(self, maps: Tensor) -> Tensor:
        return self.norm(maps)


class LessTheBatch(Net):
    def change(self, maps: Tensor) -> Tensor:
        return maps - maps.mean(0, keepdim=True)


class FirstIsSpecial(Net):
    def change(self, maps: Tensor) -> Tensor:
        return maps + maps[:1]


class Dropping(Net):
    def change(self, maps: Tensor) -> Tensor:
        return nn.functional.dropout(maps, 0.5)


class Remembering(Net):
    """Adds what the last pass saw."""

    last: Tensor | float = 0.0

    def change(self, maps: Tensor) -> Tensor:
        before, self.last = self.last, maps.mean()
        return maps + before


class Squeezing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(self.maps(x), 1).squeeze())


class TwoInputs(Net):
    def forward(self, image: Tensor, metadata: Tensor) -> Tensor:
        return super().forward(image) + metadata


class OtherSize(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).flatten(1))


class Answer(Net):
    """Returns whatever is made of its scores and maps."""

    def __init__(self, made) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        return self.made(super().forward(x), self.maps(x))


def replaced(module: nn.Module) -> nn.Module:
    """With a forward of its own, so that it cannot be adapted."""
    module.forward = types.MethodType(type(module).forward, module)
    return module


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (BatchStatistics(), "depend on the other images of a batch"),
        (LessTheBatch(), "depend on the other images of a batch"),
        (FirstIsSpecial(), "depend on the other images of a batch"),
        (Dropping(), "change from pass to pass"),
        (Remembering(), "change from pass to pass"),
        (
            TwoInputs(),
            r"takes 2 inputs \(image, metadata\); only images are served.*inputs = { metadata",
        ),
        (Net(channels=1), r"takes images of 1 channel, but is given 3\..* set channels = 1"),
        (Net(channels=4), "takes images of 4 channels"),
        (
            OtherSize(),
            r"error in its layer fc \(Linear\) for images of 12 x 12 pixels with 3 channels",
        ),
        (Answer(lambda y, m: y * float("nan")), "not finite"),
        (Answer(lambda y, m: y[:, :1]), 'set task = "binary"'),
        (Answer(lambda y, m: y[:, 0]), 'tensor of 3, .* set task = "binary"'),
        (Answer(lambda y, m: m), "with a tensor of 3 x 8 x 5 x 5"),
        (Answer(lambda y, m: y[:1] if len(y) > 1 else y[:0]), "with a tensor of 1 x 4"),
        (replaced(Squeezing()), r"one image alone.*x\.flatten\(1\)"),
        (Answer(lambda y, m: y.view(7)), r"error in its forward for images of 12 x 12 pixels"),
        (Answer(lambda y, m: (y, m)), r"tuple of 2 \(a tensor of 3 x 4, a tensor of 3 x 8 x 5"),
        (Answer(lambda y, m: {"a": y, "b": m}), "dictionary with the keys a, b"),
        (Answer(lambda y, m: {"out": m}), "with a tensor of 3 x 8 x 5 x 5"),
        (Answer(lambda y, m: "no"), "object of type str"),
    ],
)
def test_networks_that_cannot_be_served(network, message):
    with pytest.raises(ModelLoadFailed, match=message):
        prove_network(frozen(network), SIZE, "single_label")


@pytest.mark.parametrize(
    ("network", "output"),
    [
        (Answer(lambda y, m: (m, y)), 1),
        (Answer(lambda y, m: [m, y]), -1),
        (Answer(lambda y, m: {"a": m, "b": y}), "b"),
        (Answer(lambda y, m: types.SimpleNamespace(maps=m, scores=y)), "scores"),
        (Answer(lambda y, m: {"a": {"b": [m, y]}}), "a.b.1"),
        (Answer(lambda y, m: {"a.b": y, "a": m}), "a.b"),
        (Answer(lambda y, m: y[:, :, None, None]), None),
        (Answer(lambda y, m: y.squeeze()), None),
    ],
)
def test_scores_are_found_where_the_configuration_says(network, output):
    plain = Net()
    plain.load_state_dict(network.state_dict())
    images = torch.randn(3, 3, 12, 12)
    proved = prove_network(frozen(network), SIZE, "single_label", output=output)
    torch.testing.assert_close(proved.module(images), frozen(plain)(images))
    torch.testing.assert_close(proved.module(images[:1]), frozen(plain)(images[:1]))


@pytest.mark.parametrize("output", [5, "b", "shape"])
def test_an_output_that_is_not_there_is_refused(output):
    with pytest.raises(ModelLoadFailed, match="does not name a tensor in what the model returns"):
        prove_network(frozen(Answer(lambda y, m: (m, y))), SIZE, "single_label", output=output)


def test_the_operator_learns_which_shapes_did_not_fit():
    with pytest.raises(ModelLoadFailed) as caught:
        prove_network(frozen(OtherSize()), SIZE, "single_label")
    assert "mat1 and mat2" not in caught.value.message
    cause = cause_of(caught.value)
    assert "mat1 and mat2 shapes cannot be multiplied (3x200 and 8x4)" in cause
    assert "(test_network_proof.py:" in cause


def test_binary_is_for_one_score_or_two():
    with pytest.raises(ModelLoadFailed, match='4 scores per image, but task = "binary"'):
        prove_network(frozen(Net()), SIZE, "binary")


def test_a_sound_network_is_left_as_it_is():
    network = frozen(Net(7))
    before = copy.deepcopy(network)
    proved = prove_network(network, SIZE, "single_label")
    assert (proved.module, proved.outputs, proved.notes) == (network, 7, ())
    probe = probe_batch(SIZE)
    assert Fingerprint.of(network, probe).state == Fingerprint.of(before, probe).state


def test_a_network_that_hardly_tells_images_apart_is_judged_by_that_difference():
    network = Dropping()
    with torch.no_grad():
        network.fc.weight.mul_(0.01)
        network.fc.bias.fill_(10.0)
    with pytest.raises(ModelLoadFailed, match="change from pass to pass"):
        prove_network(frozen(network), SIZE, "single_label")


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(2.0)
        return super().forward(x)


def test_work_on_the_input_in_place_is_done_on_a_copy():
    images = probe_batch(SIZE)
    expected = InPlace()(images.clone())
    proved = prove_network(frozen(InPlace()), SIZE, "single_label")
    given = images.clone()
    assert torch.equal(proved.module(given), expected)
    assert torch.equal(given, images)
    assert proved.notes == ("The network works on its input in place, and is given a copy.",)
    # Gradients of the input, too.
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(proved.module(leaf).sum(), leaf)
    assert gradient.any()
    assert [name for name, _ in proved.module.named_children()] == ["conv", "fc"]


class Flat(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).mean((2, 3))) + x.view(-1)[0] * 0


def test_a_network_that_wants_contiguous_images_is_given_them():
    images = probe_batch(SIZE).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view"):
        Flat()(images)
    proved = prove_network(frozen(Flat()), SIZE, "single_label")
    torch.testing.assert_close(proved.module(images), Net()(images))
    assert "channels_last" in proved.notes[0]


class Flattening(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.maps(x).mean((2, 3))))


class Checkpointed(Net):
    reentrant = True

    def maps(self, x: Tensor) -> Tensor:
        return checkpoint(super().maps, x, use_reentrant=self.reentrant)


class RecomputingOtherwise(Checkpointed):
    reentrant = False


@pytest.mark.parametrize(
    ("network", "note"),
    [
        (Squeezing(), "fails on one image alone, which is given to it twice"),
        (Flattening(), "given one image after another"),
        (Answer(lambda y, m: y[:1]), "one image after another"),
        (Checkpointed(), "checkpointing .* is switched off"),
        (RecomputingOtherwise(), None),
    ],
)
def test_networks_of_one_size_of_batch_are_served(network, note):
    proved = prove_network(frozen(network), SIZE, "single_label")
    plain = frozen(Net())
    for count in (1, 2, 3, 5):
        images = torch.randn(count, 3, 12, 12).requires_grad_()
        found, expected = proved.module(images), plain(images)
        torch.testing.assert_close(found, expected)
        weights = torch.randn(count, 4)
        (gradient,) = torch.autograd.grad((found * weights).sum(), images)
        (right,) = torch.autograd.grad((expected * weights).sum(), images)
        torch.testing.assert_close(gradient, right)
    if note is None:
        assert proved.notes == ()
    else:
        assert re.search(note, proved.notes[0])


class RemembersSize(Net):
    size: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.size = tuple(x.shape[2:])
        return super().forward(x)


def test_a_change_of_state_is_noticed():
    network, probe = frozen(RemembersSize()), probe_batch(SIZE)
    before = Fingerprint.of(network, probe)
    before.check(network, probe)
    network(probe[..., :8, :8])
    before.check(network, probe)
    with torch.no_grad():
        network.fc.bias[0] += 1e-3
    with pytest.raises(ModelLoadFailed, match=r"\(fc\.bias\)"):
        before.check(network, probe)


class Counting(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_counters_may_go_on():
    network, probe = frozen(Counting()), probe_batch(SIZE)
    Fingerprint.of(network, probe).check(network, probe)


class Ending(nn.Module):
    """Scores of a linear layer, and what `end` makes of them."""

    def __init__(self, outputs: int, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, outputs)
        self.end = end

    def forward(self, images: Tensor) -> Tensor:
        return self.end(self.fc(images.mean((2, 3))))


def test_one_of_two_probabilities_has_the_difference_of_both_scores():
    net = Ending(2, lambda y: y.softmax(1)[:, 1]).eval().requires_grad_(False)
    images = torch.randn(3, 3, 8, 8)
    scores = net.fc(images.mean((2, 3)))
    proved = prove_network(net, Preprocess(resize=8, crop=(8, 8)), "binary")
    expected = scores[:, 1:] - scores[:, :1]
    torch.testing.assert_close(proved.module(images), expected, rtol=1e-4, atol=1e-4)


def test_heads_with_a_sigmoid_each_are_told_from_heads_of_several_kinds():
    def alike(y: Tensor) -> Tensor:
        return torch.cat([y[:, :1].sigmoid(), y[:, 1:].sigmoid()], 1)

    def mixed(y: Tensor) -> Tensor:
        return torch.cat([y[:, :1].sigmoid(), y[:, 1:].softmax(1)], 1)

    preprocess = Preprocess(resize=8, crop=(8, 8))
    images = torch.randn(3, 3, 8, 8)
    for end, is_undone in ((alike, True), (mixed, False)):
        net = Ending(3, end).eval().requires_grad_(False)
        scores, plain = net.fc(images.mean((2, 3))), net(images)
        found = prove_network(net, preprocess, "multi_label").module(images)
        expected = scores if is_undone else plain
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
