"""The attention modules of a vision transformer, and how they compute their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.errors import MethodNotApplicable
from models.layers import Layouts, TokenLayout

Weigh = Callable[[Any, tuple[Any, ...]], tuple[Tensor, Callable[[Tensor], Tensor]]]
"""From an attention module and its arguments: weights (N, heads, T, T), and its output of them."""

NOT_A_TRANSFORMER = "Attention methods need a vision transformer whose attention spans all patches."
UNKNOWN_ATTENTION = "Attention methods do not know how this model computes its attention."


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
            raise MethodNotApplicable(NOT_A_TRANSFORMER)
        if weigh is None:
            raise MethodNotApplicable(UNKNOWN_ATTENTION)
        attentions.append(Attention(name=name, block=block, weigh=weigh))
        found.add(layout)
    if len(found) != 1:
        raise MethodNotApplicable(NOT_A_TRANSFORMER)
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
