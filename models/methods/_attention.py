"""Attention weights of vision transformers, and gradients with respect to them.

Fused attention never shows its weights. A forward hook on each attention module computes them from
what the module was given and from its own parameters, and hands on an output that is made from
them, so that autograd sees them. Each replaced output is compared with the module's own: an
attention that computes something else (rotated positions, biases, masks) is refused, not explained
wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import MethodNotApplicable
from models.extractor import Extractor
from models.hooks import ForwardHook
from models.layers import Layouts, TokenLayout
from models.steps import Subject
from models.targets import ResolvedTarget, ScoreWeights

Weigh = Callable[[Any, tuple[Any, ...]], tuple[Tensor, Callable[[Tensor], Tensor]]]
"""From an attention module and its arguments: weights (N, heads, T, T), and its output of them."""

_NOT_A_TRANSFORMER = (
    "Attention methods need a vision transformer whose attention spans all patches."
)
_UNKNOWN_ATTENTION = "Attention methods do not know how this model computes its attention."

_TOLERANCE = 1e-4
_HALF_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Attention:
    """An attention module of a transformer.

    Attributes:
        name: dotted name.
        block: dotted name of the module around it, whose output is the tokens after the block.
        weigh: how its weights are computed.
    """

    name: str
    block: str
    weigh: Weigh


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """The attention modules of a model, first to last, and where their tokens lie."""

    attentions: tuple[Attention, ...]
    layout: TokenLayout

    @property
    def least_tokens(self) -> int:
        """Number of tokens up to the last one that has a place; others may follow."""
        return self.layout.prefix + self.layout.grid[0] * self.layout.grid[1]


def find_transformer(module: nn.Module, layouts: Layouts) -> Transformer:
    """Find the attention modules of a vision transformer.

    Raises:
        MethodNotApplicable: it has none, or some that work on windows or in an unknown way.
    """
    attentions: list[Attention] = []
    found: set[TokenLayout] = set()
    for name, child in module.named_modules():
        if "attention" not in type(child).__name__.lower():
            continue
        block = name.rpartition(".")[0]
        weigh, layout = weigher_of(child), layouts.get(block)
        if layout is None or layout.channels_last:
            raise MethodNotApplicable(_NOT_A_TRANSFORMER)
        if weigh is None:
            raise MethodNotApplicable(_UNKNOWN_ATTENTION)
        attentions.append(Attention(name=name, block=block, weigh=weigh))
        found.add(layout)
    if len(found) != 1:
        raise MethodNotApplicable(_NOT_A_TRANSFORMER)
    return Transformer(attentions=tuple(attentions), layout=found.pop())


def weigher_of(module: nn.Module) -> Weigh | None:
    """How the weights of an attention module are computed; None if that is unknown."""
    if isinstance(module, nn.MultiheadAttention):
        return _multihead if module.batch_first and module.in_proj_weight is not None else None
    parts = ("qkv", "q_norm", "k_norm", "proj", "num_heads", "scale")
    return _joint if all(hasattr(module, part) for part in parts) else None


def _multihead(
    module: nn.MultiheadAttention, args: tuple[Any, ...]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Weights of torch's own module in self-attention, as in torchvision's transformers."""
    joint = nn.functional.linear(args[0], module.in_proj_weight, module.in_proj_bias)
    return _weights(joint, module.num_heads, project=module.out_proj)


def _joint(module: Any, args: tuple[Any, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Weights of timm's `Attention`: one layer for queries, keys and values."""
    return _weights(
        module.qkv(args[0]),
        module.num_heads,
        normalise=(module.q_norm, module.k_norm),
        scale=module.scale,
        project=lambda mixed: module.proj(getattr(module, "norm", nn.Identity())(mixed)),
    )


def _weights(
    joint: Tensor,
    heads: int,
    *,
    project: Callable[[Tensor], Tensor],
    normalise: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """softmax(scale q k^T) of `joint` (N, T, 3 heads d), and the output that it leads to."""
    images, tokens, _ = joint.shape
    split = joint.reshape(images, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = split.unbind(0)
    if normalise is not None:
        query, key = normalise[0](query), normalise[1](key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = (query * scale @ key.transpose(-2, -1)).softmax(-1)

    def mix(weights: Tensor) -> Tensor:
        return project((weights @ value).transpose(1, 2).reshape(images, tokens, -1))

    return weights, mix


def verify_transformer(module: nn.Module, layouts: Layouts, inputs: Tensor) -> None:
    """Check that attention can be made visible in a model, by a pass with `inputs` (N, 3, H, W).

    Raises:
        MethodNotApplicable: it cannot; the text says why.
    """
    transformer, seen = find_transformer(module, layouts), Seen()
    hooks = _hooks(transformer, seen)
    with Extractor(module, [], changes=hooks) as extractor:
        extractor.forward(inputs, graph=True)
    seen.check(transformer)


def attention_hook(attention: Attention, seen: Seen) -> ForwardHook:
    """A forward hook that replaces an attention's output by one made from visible weights.

    The weights are noted in `seen`; those that no graph has reached yet begin one.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # A hook does not see what was passed by keyword.
        if not args:
            raise MethodNotApplicable(_UNKNOWN_ATTENTION)
        own = output if isinstance(output, Tensor) else output[0]
        weights, mix = attention.weigh(module, args)
        weights = weights if weights.requires_grad else weights.detach().requires_grad_()
        seen.weights.append(weights)
        made = mix(weights)
        seen.compare(made, own)
        return made if isinstance(output, Tensor) else (made, *output[1:])

    return hook


def _hooks(transformer: Transformer, seen: Seen) -> list[tuple[str, ForwardHook]]:
    return [(a.name, attention_hook(a, seen)) for a in transformer.attentions]


@dataclass
class Seen:
    """What the hooks of one pass saw.

    Attributes:
        weights: (N, heads, T, T) of each attention, in the order of the pass, with a graph.
    """

    weights: list[Tensor] = field(default_factory=list)
    _errors: list[Tensor] = field(default_factory=list)

    def compare(self, made: Tensor, own: Tensor) -> None:
        """Note how far a replaced output is from the module's own, less what rounding explains."""
        if made.shape != own.shape:
            raise MethodNotApplicable(_UNKNOWN_ATTENTION)
        made, own = made.detach(), own.detach()
        tolerance = _TOLERANCE if own.dtype == torch.float32 else _HALF_TOLERANCE
        self._errors.append((made - own).abs().max() - tolerance * own.abs().max())

    def check(self, transformer: Transformer) -> None:
        """Check what was seen, after the pass: one synchronisation with the device for all.

        Raises:
            MethodNotApplicable: an output was not reproduced, or some tokens were not seen once.
        """
        shapes = {tuple(weights.shape[-2:]) for weights in self.weights}
        whole = all(q == k >= transformer.least_tokens for q, k in shapes)
        if len(self.weights) != len(transformer.attentions) or len(shapes) != 1 or not whole:
            raise MethodNotApplicable(_NOT_A_TRANSFORMER)
        # Written so that NaN is refused, too.
        if not bool(torch.stack(self._errors).max() <= 0):
            raise MethodNotApplicable(_UNKNOWN_ATTENTION)


@dataclass(frozen=True)
class Attended:
    """Attention of one image and its gradients for one target.

    Attributes:
        weights: (heads, T, T) float32 of each layer, rows sum to 1.
        gradients: the same shapes, of the target's score.
        layout: where the tokens lie.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    layout: TokenLayout

    @property
    def read(self) -> Tensor:
        """(T,) share of each token in the scores: equal among those that the head reads."""
        queried = self.gradients[-1].abs().sum((0, 2)) > 0
        return queried / queried.sum().clamp_min(1)


def attend(
    subject: Subject, targets: Sequence[ResolvedTarget], reduce: Callable[[Attended], Tensor]
) -> Tensor:
    """One pass, and a backward pass for each target: the maps (T, h, w) that `reduce` makes.

    Raises:
        MethodNotApplicable: the model is not a vision transformer that is understood here.
    """
    transformer = find_transformer(subject.module, subject.layouts)
    layout, seen = transformer.layout, Seen()
    hooks = _hooks(transformer, seen)
    with Extractor(subject.module, [], changes=[*hooks, *subject.changes(1)]) as extractor:
        logits, _ = subject.read(extractor.forward(subject.inputs.clone(), graph=True))
        seen.check(transformer)
        scores = ScoreWeights([targets], logits.device).of(logits)[0]
        weights = [w.detach()[0].float() for w in seen.weights]
        maps = []
        for score in scores:
            gradients = torch.autograd.grad(score, seen.weights, retain_graph=True)
            maps.append(reduce(Attended(weights, [g[0].float() for g in gradients], layout)))
    return torch.stack(maps)


def layer_gradients(
    subject: Subject, targets: Sequence[ResolvedTarget]
) -> tuple[list[list[Tensor]], TokenLayout]:
    """Gradients of each layer's own score with respect to its own attention, for each target.

    The score of a layer is what the rest of the model after the last block makes of the tokens
    after this one. One pass gives all: every block hands on its output cut off the graph, and the
    last hands on those of all blocks as a batch.

    Returns:
        For each target, (heads, T, T) float32 for each layer; and where the tokens lie.

    Raises:
        MethodNotApplicable: the model is not a vision transformer that is understood here.
    """
    transformer = find_transformer(subject.module, subject.layouts)
    layout, seen, tokens = transformer.layout, Seen(), []
    depth = len(transformer.attentions)

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        tokens.append(output)
        return output.detach() if len(tokens) < depth else torch.cat(tokens)

    hooks = _hooks(transformer, seen)
    blocks = [(a.block, keep) for a in transformer.attentions]
    changes = [*hooks, *_by_batch(subject, depth), *blocks]
    with Extractor(subject.module, [], changes=changes) as extractor:
        logits, _ = subject.read(extractor.forward(subject.inputs.clone(), graph=True))
        seen.check(transformer)
        scores = ScoreWeights([targets] * depth, logits.device).of(logits)
        by_target = [
            [g[0].float() for g in torch.autograd.grad(score, seen.weights, retain_graph=True)]
            for score in scores.sum(0)
        ]
    return by_target, layout


def _by_batch(subject: Subject, rows: int) -> list[tuple[str, ForwardHook]]:
    """The interventions, for passes whose batch is one image first and `rows` of it later."""
    pairs = zip(subject.changes(1), subject.changes(rows), strict=True)
    return [(layer, _either(single, several)) for (layer, single), (_, several) in pairs]


def _either(single: ForwardHook, several: ForwardHook) -> ForwardHook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (single if len(output) == 1 else several)(module, args, output)

    return hook
