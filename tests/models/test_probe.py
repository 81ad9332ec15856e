"""What a probed forward records."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.probe import probe_batch, trace
from models.types import Preprocess

SIZE = Preprocess(resize=8, crop=(8, 8))


class BatchOutcomes(nn.Module):
    """BatchOutcomes whatever it was made with."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def test_the_probe_is_the_same_at_each_call_and_has_the_models_size():
    probe = probe_batch(Preprocess(resize=20, crop=(8, 12)), images=3)
    assert probe.shape == (3, 3, 8, 12)
    assert torch.equal(probe, probe_batch(Preprocess(resize=20, crop=(8, 12)), images=3))
    assert not torch.equal(probe[0], probe[1])


class Blocks(nn.Module):
    """A network whose modules hand on, overwrite, view and share values."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
        self.shared = nn.ReLU()
        self.idle = nn.Identity()
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x.mul_(2)  # a model may work on its input in place
        x = self.shared(self.shared(self.idle(self.block(x))) - 1)
        return self.head(x.mean((2, 3)))


def test_a_trace_tells_who_made_which_values():
    traced = trace(Blocks().eval().requires_grad_(False), "single_label", probe_batch(SIZE))
    assert list(traced.times) == ["block", "block.0", "block.1", "shared", "idle", "head"]
    assert [call.name for call in traced.calls.values()] == [
        "block.0", "block.1", "block", "idle", "shared#1", "shared#2", "head",
    ]  # fmt: skip
    assert [[call.name for call in group] for group in traced.groups()] == [
        ["block.0"], ["block.1", "block", "idle"], ["shared#1"], ["shared#2"], ["head"],
    ]  # fmt: skip
    assert traced.calls["block.0"].overwritten
    assert not traced.calls["block"].overwritten
    assert traced.times["shared"] == 2
    assert traced.scores.requires_grad


def test_a_trace_leaves_no_hook_even_when_the_model_fails():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), BatchOutcomes(lambda x: x.view(7)))
    with pytest.raises(RuntimeError):
        trace(module, "single_label", probe_batch(SIZE))
    assert not any(m._forward_hooks for m in module.modules())


def test_a_single_logit_is_traced_as_two_classes():
    module = BatchOutcomes(lambda x: x.flatten(1)[:, :1])
    traced = trace(module, "binary", probe_batch(SIZE))
    assert torch.equal(traced.scores[:, 0], -traced.scores[:, 1])
