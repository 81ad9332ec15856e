"""Attention weights of vision transformers, and gradients with respect to them, without touching the model.

Fused attention never shows its weights. A forward hook on each attention module computes them from
what the module was given and from its own parameters, and hands on an output that is made from
them, so that autograd sees them. Each replaced output is compared with the module's own: an
attention that computes something else (rotated positions, biases, masks) is refused, not explained
wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.errors import MethodNotApplicable
from models.extractor import Extractor
from models.hooks import ForwardHook
from models.layers import Layouts, TokenLayout
from models.methods._attention_modules import Weigh, way_to_weigh
from models.targets import ResolvedTarget, ScoreWeights, class_scores

if (
    TYPE_CHECKING
):  # steps know the warm models, and whoever warms one up asks here what applies to it
    from models.steps import Subject

_NOT_A_TRANSFORMER = (
    "Attention methods need a vision transformer whose attention spans all patches."
)
_OTHER_ATTENTION = "Attention methods do not know how this model computes its attention."
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
    def tokens(self) -> int:
        """Number of tokens, the prefix among them."""
        return self.layout.prefix + self.layout.grid[0] * self.layout.grid[1]


def find_transformer(module: nn.Module, layouts: Layouts) -> Transformer:
    """Find the attention modules of a vision transformer.

    Args:
        module: the model.
        layouts: token layouts by layer name.

    Raises:
        MethodNotApplicable: it has none, or such as work on windows, or in another way than is
            known here.
    """
    attentions: list[Attention] = []
    found: set[TokenLayout] = set()
    for name, child in module.named_modules():
        if "attention" not in type(child).__name__.lower():
            continue
        block = name.rpartition(".")[0]
        weigh, layout = way_to_weigh(child), layouts.get(block)
        if layout is None or layout.channels_last:
            raise MethodNotApplicable(_NOT_A_TRANSFORMER)
        if weigh is None:
            raise MethodNotApplicable(_OTHER_ATTENTION)
        attentions.append(Attention(name=name, block=block, weigh=weigh))
        found.add(layout)
    if len(found) != 1:
        raise MethodNotApplicable(_NOT_A_TRANSFORMER)
    return Transformer(attentions=tuple(attentions), layout=found.pop())


def verify_transformer(module: nn.Module, layouts: Layouts, inputs: Tensor) -> None:
    """Check that attention can be made visible in a model, by a pass with `inputs` (N, 3, H, W).

    Raises:
        MethodNotApplicable: it cannot; the text says why.
    """
    transformer, seen = find_transformer(module, layouts), Seen()
    hooks = [(a.name, attention_hook(a, seen)) for a in transformer.attentions]
    with Extractor(module, [], changes=hooks) as extractor:
        extractor.forward(inputs, graph=True)
    seen.check(transformer)


def attention_hook(attention: Attention, seen: Seen) -> ForwardHook:
    """A forward hook that replaces the attention's output by one made from visible weights, noted in `seen`.

    Weights that no graph has reached yet begin one.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args:  # called by keywords, which a hook does not see
            raise MethodNotApplicable(_OTHER_ATTENTION)
        own = output if isinstance(output, Tensor) else output[0]
        weights, mix = attention.weigh(module, args)
        weights = weights if weights.requires_grad else weights.detach().requires_grad_()
        seen.weights.append(weights)
        made = mix(weights)
        seen.compare(made, own)
        return made if isinstance(output, Tensor) else (made, *output[1:])

    return hook


@dataclass
class Seen:
    """What the hooks of one pass saw.

    Attributes:
        weights: (N, heads, T, T) of each attention, in the order of the pass, with a graph.
    """

    weights: list[Tensor] = field(default_factory=list)
    _errors: list[Tensor] = field(default_factory=list)

    def compare(self, made: Tensor, own: Tensor) -> None:
        """Note how far a replaced output is from the module's own, beyond what rounding explains."""
        if made.shape != own.shape:
            raise MethodNotApplicable(_OTHER_ATTENTION)
        made, own = made.detach(), own.detach()
        tolerance = _TOLERANCE if own.dtype == torch.float32 else _HALF_TOLERANCE
        self._errors.append((made - own).abs().max() - tolerance * own.abs().max())

    def check(self, transformer: Transformer) -> None:
        """Check what was seen, after the pass: one synchronisation with the device for all.

        Raises:
            MethodNotApplicable: an output was not reproduced, or attentions did not each see all
                tokens once.
        """
        shapes = {tuple(weights.shape[-2:]) for weights in self.weights}
        tokens = transformer.tokens
        if len(self.weights) != len(transformer.attentions) or shapes != {(tokens, tokens)}:
            raise MethodNotApplicable(_NOT_A_TRANSFORMER)
        if not bool(torch.stack(self._errors).max() <= 0):  # NaN is no proof either
            raise MethodNotApplicable(_OTHER_ATTENTION)


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
        """(T,) share of each token in what the scores are made from: equal among those the last layer answers to."""
        queried = self.gradients[-1].abs().sum((0, 2)) > 0
        return queried / queried.sum().clamp_min(1)


def attend(
    subject: Subject, targets: Sequence[ResolvedTarget], reduce: Callable[[Attended], Tensor]
) -> Tensor:
    """One pass and one backward pass for each target; keeps only what `reduce` makes of each, (T, h, w).

    Raises:
        MethodNotApplicable: the model is not a vision transformer that is understood here.
    """
    warm = subject.warm
    transformer = find_transformer(warm.module, warm.layouts)
    layout, seen = transformer.layout, Seen()
    hooks = [(a.name, attention_hook(a, seen)) for a in transformer.attentions]
    with Extractor(warm.module, [], changes=[*hooks, *subject.changes(1)]) as extractor:
        logits, _ = class_scores(extractor.forward(subject.inputs.clone(), graph=True), warm.task)
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
    warm = subject.warm
    transformer = find_transformer(warm.module, warm.layouts)
    layout, seen, tokens = transformer.layout, Seen(), []
    depth = len(transformer.attentions)

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        tokens.append(output)
        return output.detach() if len(tokens) < depth else torch.cat(tokens)

    hooks = [(a.name, attention_hook(a, seen)) for a in transformer.attentions]
    blocks = [(a.block, keep) for a in transformer.attentions]
    changes = [*hooks, *_by_batch(subject, depth), *blocks]
    with Extractor(warm.module, [], changes=changes) as extractor:
        logits, _ = class_scores(extractor.forward(subject.inputs.clone(), graph=True), warm.task)
        seen.check(transformer)
        scores = ScoreWeights([targets] * depth, logits.device).of(logits)
        by_target = [
            [g[0].float() for g in torch.autograd.grad(score, seen.weights, retain_graph=True)]
            for score in scores.sum(0)
        ]
    return by_target, layout


def _by_batch(subject: Subject, rows: int) -> list[tuple[str, ForwardHook]]:
    """The subject's interventions, for passes whose batch is one picture first and `rows` of it later."""
    return [
        (layer, _either(single, several))
        for (layer, single), (_, several) in zip(
            subject.changes(1), subject.changes(rows), strict=True
        )
    ]


def _either(single: ForwardHook, several: ForwardHook) -> ForwardHook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (single if len(output) == 1 else several)(module, args, output)

    return hook
