"""What the extractor gives out, and that it leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.errors import UnknownLayer
from models.extractor import Extractor, InplaceConflict, Tap
from models.hooks import HookStack

HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


def hooks_left(module: nn.Module) -> int:
    return sum(len(getattr(m, name)) for m in module.modules() for name in HOOK_DICTS)


ALL_KINDS = [Tap("body", kind) for kind in ("input", "output", "grad_input", "grad_output")]


def reference(net: nn.Module, x: torch.Tensor, target: int) -> dict[str, torch.Tensor]:
    """Tensors around `body` by plain float64 autograd, with the network written out by hand."""
    net = copy.deepcopy(net).double()
    into = net.stem(x.double()).relu().detach().requires_grad_()
    out = net.body(into)
    out.retain_grad()
    into.retain_grad()
    pooled = out.relu().mean((2, 3))
    net.fc(pooled)[:, target].sum().backward()
    return {"input": into, "output": out, "grad_input": into.grad, "grad_output": out.grad}


@pytest.mark.parametrize("tensor_hooks_only", [False, True])
def test_all_four_kinds_equal_float64_autograd(pool_net, images, tensor_hooks_only):
    pool_net.out.inplace = False  # full backward hooks need a successor that does not work in place
    expected = reference(pool_net, images, 2)
    with Extractor(pool_net, ALL_KINDS, tensor_hooks_only=tensor_hooks_only) as extractor:
        logits = extractor.forward(images)
        extractor.backward(logits[:, 2].sum())
        caught = {tap.kind: extractor.caught("body", tap.kind) for tap in ALL_KINDS}
    for kind, tensor in caught.items():
        torch.testing.assert_close(tensor.double(), expected[kind].detach(), rtol=1e-5, atol=1e-6)


def test_in_place_successor_does_not_overwrite_what_was_caught(pool_net, images):
    expected = reference(pool_net, images, 0)
    taps = [Tap("body", "output"), Tap("body", "grad_output")]
    with Extractor(pool_net, taps) as extractor:
        extractor.backward(extractor.forward(images)[:, 0].sum())
        output = extractor.caught("body", "output").double()
        gradient = extractor.caught("body", "grad_output").double()
    assert (output < 0).any(), (
        "the pre-activation has negative values that an in-place ReLU would erase"
    )
    torch.testing.assert_close(output, expected["output"].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected["grad_output"], rtol=1e-5, atol=1e-6)
    with Extractor(pool_net, [Tap("body", "output")]) as extractor:
        extractor.forward(images)
        without_gradient = extractor.caught("body", "output").double()
    torch.testing.assert_close(without_gradient, expected["output"].detach(), rtol=1e-5, atol=1e-6)


def test_full_backward_hook_meets_in_place_successor_and_tensor_hooks_do_not(pool_net, images):
    taps = [Tap("body", "grad_input")]
    with Extractor(pool_net, taps) as extractor, pytest.raises(InplaceConflict):
        extractor.forward(images)
    assert hooks_left(pool_net) == 0
    with Extractor(pool_net, taps, tensor_hooks_only=True) as extractor:
        extractor.backward(extractor.forward(images)[:, 1].sum())
        gradient = extractor.caught("body", "grad_input").double()
    torch.testing.assert_close(
        gradient, reference(pool_net, images, 1)["grad_input"], rtol=1e-5, atol=1e-6
    )


def test_a_layer_behind_another_gets_its_gradient_from_the_same_pass(flat_net, images):
    layers = ("stem", "body", "fc1")
    taps = [Tap(name, kind) for name in layers for kind in ("output", "grad_output")]
    with Extractor(flat_net, taps) as extractor:
        extractor.backward(extractor.forward(images)[:, 3].sum())
        together = {name: extractor.caught(name, "grad_output") for name in layers}
    for name in layers:
        with Extractor(flat_net, [Tap(name, "grad_output")]) as extractor:
            extractor.backward(extractor.forward(images)[:, 3].sum())
            torch.testing.assert_close(extractor.caught(name, "grad_output"), together[name])


def test_several_targets_from_one_forward(flat_net, images):
    calls = []
    with HookStack() as hooks:
        hooks.forward(flat_net.stem, lambda *_: calls.append(1))
        with Extractor(flat_net, [Tap("out", "grad_output")]) as extractor:
            logits = extractor.forward(images)
            gradients = []
            for t in range(5):
                extractor.backward(logits[:, t].sum(), again=t < 4)
                gradients.append(extractor.caught("out", "grad_output"))
    assert len(calls) == 1
    assert len({g.sum().item() for g in gradients}) == 5


def test_nothing_before_the_tapped_layer_is_recorded(pool_net, images):
    seen = {}
    with HookStack() as hooks, Extractor(pool_net, [Tap("out", "grad_output")]) as extractor:
        hooks.forward(pool_net.body, lambda _, __, out: seen.update(body=out.requires_grad))
        hooks.forward(pool_net.fc, lambda _, __, out: seen.update(fc=out.requires_grad))
        extractor.forward(images)
    assert seen == {"body": False, "fc": True}


def test_no_graph_at_all_without_gradients(pool_net, images):
    with Extractor(pool_net, [Tap("out", "output")]) as extractor:
        assert not extractor.forward(images).requires_grad


def test_logits_are_bit_identical_with_and_without_hooks(pool_net, flat_net, images):
    for net, layer in ((pool_net, "out"), (flat_net, "body")):
        with torch.inference_mode():
            plain = net(images)
        with Extractor(net, [Tap(layer, "output"), Tap(layer, "grad_output")]) as extractor:
            assert torch.equal(extractor.forward(images).detach(), plain)


def test_the_model_is_left_as_it_was(pool_net, images):
    before = copy.deepcopy(pool_net.state_dict())
    with Extractor(pool_net, [Tap("out", "output"), Tap("out", "grad_output")]) as extractor:
        extractor.backward(extractor.forward(images).sum())
    assert hooks_left(pool_net) == 0
    assert not any(m.training for m in pool_net.modules())
    assert all(p.grad is None and not p.requires_grad for p in pool_net.parameters())
    after = pool_net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert images.grad is None


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first(x)
        raise RuntimeError("the model's own fault")


@pytest.mark.parametrize("kind", ["input", "output", "grad_input", "grad_output"])
def test_no_hook_survives_a_model_error(kind, images):
    net = Broken().eval().requires_grad_(False)
    with (
        pytest.raises(RuntimeError, match="own fault"),
        Extractor(net, [Tap("first", kind)]) as extractor,
    ):
        extractor.forward(images)
    assert hooks_left(net) == 0


def test_no_hook_survives_a_user_error(pool_net, images):
    with pytest.raises(UnknownLayer):
        Extractor(pool_net, [Tap("out", "output"), Tap("nowhere", "output")])
    with pytest.raises(IndexError), Extractor(pool_net, [Tap("out", "grad_output")]) as extractor:
        extractor.backward(extractor.forward(images)[:, 99].sum())
    assert hooks_left(pool_net) == 0


def test_no_hook_survives_an_error_inside_a_hook(pool_net, images):
    def fail(_: torch.Tensor) -> None:
        raise ValueError("no room")

    with (
        pytest.raises(ValueError, match="no room"),
        Extractor(pool_net, [Tap("body", "input"), Tap("out", "output", fail)]) as extractor,
    ):
        extractor.forward(images)
    assert hooks_left(pool_net) == 0


def test_a_layer_without_part_in_the_score_has_no_gradient(pool_net, images):
    with Extractor(pool_net, [Tap("out", "grad_output")]) as extractor:
        logits = extractor.forward(images)
        extractor.backward((logits * 0 + 1).sum().detach())
        assert extractor.caught("out", "grad_output") is None


class Halves(nn.Module):
    """Hands its idle layer the upper and lower half of each image as images of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.idle(torch.cat(x.chunk(2, 2))).flatten(1)[: len(x), :5]


@pytest.mark.parametrize("kind", ["input", "output", "grad_input", "grad_output"])
def test_a_layer_whose_first_dimension_is_not_the_batch_ends_the_pass(kind, images):
    net = Halves().eval()
    with (
        pytest.raises(UnknownLayer, match="idle cannot be used"),
        Extractor(net, [Tap("idle", kind)]) as extractor,
    ):
        extractor.forward(images)
    assert hooks_left(net) == 0


def test_one_call_of_a_module_is_tapped(pool_net, images):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Hardtanh(), nn.Conv2d(3, 3, 1), nn.Flatten())
    net.insert(3, net[1])
    net.eval().requires_grad_(False)
    taps = [Tap(f"1#{call}", kind) for call in (1, 2) for kind in ("output", "grad_input")]
    with Extractor(net, taps) as extractor:
        extractor.backward(extractor.forward(images).sum())
        caught = {tap: extractor.caught(tap.layer, tap.kind) for tap in taps}
    first = net[0](images).requires_grad_()
    second = net[2](first.clamp(-1, 1))
    second.retain_grad()
    second.clamp(-1, 1).sum().backward()
    expected = [first.clamp(-1, 1), first.grad, second.clamp(-1, 1), second.grad]
    for found, right in zip(caught.values(), expected, strict=True):
        torch.testing.assert_close(found, right.detach())
