"""What follows the target layer, and whether that makes the gradient there W[c]/Z."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from models.hooks import HookStack, find_call
from models.layers import TokenLayout, to_map
from models.probe import probe_batch
from models.targets import ScoreWeights, class_scores
from models.types import HeadKind, Preprocess, Task

PROBED_CLASSES = 8
STRONG = 5.0
TOLERANCE = 1e-5
SCORE_TOLERANCE = 1e-4
HALF_SCORE_TOLERANCE = 2e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadProbe:
    """What is known of the part of a model that follows its target layer.

    Attributes:
        kind: `gap_linear`: global average pooling, then one linear layer; `gap`: the gradient is
            the same at every position, but is not a row of a linear layer; `token`: a token
            sequence that is read elsewhere than by averaging; `flatten`: anything else.
        closed_form: whether the gradient of class c at the layer was proved to be weight[c] / (h·w)
            everywhere.
        weight: (classes, channels) float32 of the linear layer, on the model's device; only with
            `closed_form`.
        bias: (classes,) float32 of that layer, if it has one.
    """

    kind: HeadKind
    closed_form: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None

    def reproduces(
        self,
        maps: Tensor,
        logits: Tensor,
        *,
        dtype: torch.dtype,
        targets: ScoreWeights | None = None,
    ) -> bool:
        """Whether the closed form gives a batch's scores (N, classes) from its maps (N, C, h, w).

        It was proved on a few images; others may be bent by what follows the layer. `dtype` is what
        the model computes in. With `targets` only their scores are compared: a network has many
        more classes.
        """
        if self.weight is None:
            return False
        pooled = maps.float().mean((2, 3))
        if targets is None:
            expected = nn.functional.linear(pooled, self.weight, self.bias)
            error = (expected - logits).abs().amax(1)
        else:
            expected = (targets.of_rows(self.weight) * pooled[:, None]).sum(2)
            if self.bias is not None:
                expected = expected + targets.of_rows(self.bias[:, None])[..., 0]
            error = (expected - targets.of(logits)).abs().amax(1)
        # Scores may be small where their terms cancel, and are then no measure of rounding.
        size = logits.abs().amax(1) + self._steepness * pooled.norm(dim=1)
        tolerance = SCORE_TOLERANCE if dtype == torch.float32 else HALF_SCORE_TOLERANCE
        # Written so that scores that are not finite, which are refused elsewhere, pass.
        return not bool((error > tolerance * size).any())

    @cached_property
    def _steepness(self) -> float:
        """Largest norm of a class's weights."""
        assert self.weight is not None
        return float(self.weight.norm(dim=1).max())

    def to(self, device: torch.device) -> HeadProbe:
        """Return the same with its tensors on a device."""
        return replace(
            self,
            weight=None if self.weight is None else self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut:
    """A pass whose graph begins at the layer, and the linear layer that made its scores."""

    activation: Tensor
    scores: Tensor
    last_linear: nn.Module | None


def head_batch(preprocess: Preprocess) -> Tensor:
    """Return (4, 3, H, W): noise, strong noise, a black image and a white one."""
    noise, other = probe_batch(preprocess, images=2)
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    flat = [(level - mean) / std + torch.zeros_like(noise) for level in (0.0, 1.0)]
    return torch.stack([noise, STRONG * other, *flat])


def probe_head(
    module: nn.Module, layer_name: str, *, layout: TokenLayout | None, task: Task, probe: Tensor
) -> HeadProbe:
    """Find out what follows a layer, by autograd on a probe batch.

    The closed form is granted when for several classes and all images the gradient at every
    position is W[c]/Z within 1e-5 of the largest one, and for *all* classes W·mean(A) + b gives the
    scores. The module is frozen and float32. The probe holds images of every kind (`head_batch`),
    since bounds within a head (a clamp) show only for some.
    """
    cut = _run(module, layer_name, task, probe)
    maps = to_map(cut.activation.detach(), layout)
    gradients = _gradients(cut, layout)
    first = gradients[..., :1, :1]
    scale = gradients.abs().max()
    constant = bool((gradients - first).abs().max() <= TOLERANCE * scale) and bool(scale > 0)
    if not constant:
        tokens = layout is not None and not layout.channels_last
        return HeadProbe(kind="token" if tokens else "flatten")
    linear = None if cut.last_linear is None else _rows(cut.last_linear, task)
    if linear is None or linear[0].shape[1] != maps.shape[1]:
        return HeadProbe(kind="gap")
    weight, bias = linear
    expected = weight[_classes(cut.scores)] / (maps.shape[2] * maps.shape[3])
    if bool((gradients - expected[:, None, :, None, None]).abs().max() > TOLERANCE * scale):
        return HeadProbe(kind="gap")
    scores = maps.mean((2, 3)) @ weight.T + (0 if bias is None else bias)
    error = (scores - cut.scores.detach()).abs().max()
    if bool(error > SCORE_TOLERANCE * cut.scores.detach().abs().max()):
        return HeadProbe(kind="gap")
    return HeadProbe(kind="gap_linear", closed_form=True, weight=weight, bias=bias)


def _run(module: nn.Module, layer_name: str, task: Task, probe: Tensor) -> _Cut:
    leaves: list[Tensor] = []
    linears: list[tuple[nn.Module, Tensor]] = []

    def cut(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        leaves.append(output.detach().requires_grad_())
        # What follows may work in place, which a leaf does not allow.
        return leaves[-1].clone()

    def note(child: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        linears.append((child, output))

    with torch.enable_grad(), HookStack() as hooks:
        layer, call = find_call(module, layer_name)
        hooks.forward(layer, cut, call=call)
        for child in module.modules():
            if isinstance(child, nn.Linear) or (
                isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1) and child.groups == 1
            ):
                hooks.forward(child, note)
        answer = module(probe)
        scores, _ = class_scores(answer, task)
    last = [child for child, output in linears if torch.equal(output.flatten(1), answer)]
    return _Cut(activation=leaves[-1], scores=scores, last_linear=last[-1] if last else None)


def _classes(scores: Tensor) -> list[int]:
    """Up to 8 class indices, spread evenly."""
    count = scores.shape[1]
    kept = min(count, PROBED_CLASSES)
    return [i * count // kept for i in range(kept)]


def _gradients(cut: _Cut, layout: TokenLayout | None) -> Tensor:
    """(classes probed, N, C, h, w): the gradient of each probed class's score at the layer."""
    gradients = [
        torch.autograd.grad(cut.scores[:, index].sum(), cut.activation, retain_graph=True)[0]
        for index in _classes(cut.scores)
    ]
    return torch.stack([to_map(gradient, layout) for gradient in gradients])


def _rows(linear: nn.Module, task: Task) -> tuple[Tensor, Tensor | None]:
    """Weight (classes, channels) and bias (classes,) of the scores; one logit has two rows."""
    assert isinstance(linear, (nn.Linear, nn.Conv2d))
    weight, _ = class_scores(linear.weight.detach().flatten(1).T, task)
    if linear.bias is None:
        return weight.T.contiguous(), None
    bias, _ = class_scores(linear.bias.detach()[None], task)
    return weight.T.contiguous(), bias[0]
