"""How attention modules compute their weights, and their output from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Weigh = Callable[[Any, tuple[Any, ...]], tuple[Tensor, Callable[[Tensor], Tensor]]]
"""From an attention module and what it was called with: weights (N, heads, T, T), and its output made from them."""


def way_to_weigh(module: nn.Module) -> Weigh | None:
    """How the weights of an attention module are computed; None if that is not known here."""
    if isinstance(module, nn.MultiheadAttention):
        return _multihead if module.batch_first and module.in_proj_weight is not None else None
    parts = ("qkv", "q_norm", "k_norm", "proj", "num_heads", "scale")
    return _joint if all(hasattr(module, part) for part in parts) else None


def _multihead(
    module: nn.MultiheadAttention, args: tuple[Any, ...]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Weights of torch's own module where it attends from tokens to themselves, as in torchvision's transformers."""
    joint = nn.functional.linear(args[0], module.in_proj_weight, module.in_proj_bias)
    return _weights(joint, module.num_heads, project=module.out_proj)


def _joint(module: Any, args: tuple[Any, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Weights of timm's `Attention`: one layer for queries, keys and values, which may be normalised."""
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
    """softmax(scale q k^T) for `joint` queries, keys and values (N, T, 3 heads d), and the output it leads to."""
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
