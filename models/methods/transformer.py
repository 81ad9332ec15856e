"""Methods that explain vision transformers by their attention.

Each is a generator of steps that returns float32 maps (T, h, w) on the grid of patches; class,
distillation and register tokens have no place in it and are left out. Notation: A_l = the attention
weights of layer l (heads, tokens, tokens), dA_l = their gradient, E_h = mean over heads. Relevance
is read at the tokens from which the model makes its scores: the class token, or the mean of the
patches for models that pool them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from models.layers import TokenLayout
from models.methods._attention import Attended, attend, layer_gradients
from models.steps import Steps, Subject, run_by_targets, run_unbatched
from models.targets import ResolvedTarget


def attention_rollout(subject: Subject) -> Steps:
    """Attention rollout (Abnar and Zuidema 2020, eq. 1), the same for every class.

    R = B_L … B_1 with B_l = (E_h A_l + I) / 2, whose rows sum to 1.

    Raises:
        MethodNotApplicable: the model is not a vision transformer that is understood here.
    """
    run = partial(attend, subject, subject.targets[:1], _rollout)
    maps = yield from run_unbatched(run, cost=3)
    return maps.repeat(len(subject.targets), 1, 1)


def gradient_rollout(subject: Subject) -> Steps:
    """Rollout of attention weighted by its gradient, as in vit-explain (Gildenblat 2020).

    B_l = (E_h[dA_l * A_l])^+ + I, its rows scaled to sum to 1.

    Raises:
        MethodNotApplicable: the model is not a vision transformer that is understood here.
    """
    return _by_target(subject, _gradient_rollout)


def transformer_attribution(subject: Subject) -> Steps:
    """Generic attention explainability (Chefer et al. 2021, eq. 5 and 6).

    R starts as I; R <- R + E_h[(dA_l * A_l)^+] R, layer by layer.

    Raises:
        MethodNotApplicable: the model is not a vision transformer that is understood here.
    """
    return _by_target(subject, _attribution)


def legrad(subject: Subject) -> Steps:
    """LeGrad (Bousselham et al. 2024, eq. 6 to 8).

    Mean over layers, heads and queries of (ds_l / dA_l)^+, where s_l is the score that the model's
    head gives to the tokens after layer l.

    Raises:
        MethodNotApplicable: the model is not a vision transformer that is understood here.
    """
    return run_by_targets(subject, partial(_legrad, subject), cost=3)


def _by_target(subject: Subject, reduce: Callable[[Attended], Tensor]) -> Steps:
    return run_by_targets(subject, lambda targets: attend(subject, targets, reduce), cost=3)


def _rollout(seen: Attended) -> Tensor:
    return _rolled(seen, [_row_scaled(weights.mean(0)) for weights in seen.weights])


def _gradient_rollout(seen: Attended) -> Tensor:
    pairs = zip(seen.gradients, seen.weights, strict=True)
    return _rolled(seen, [_row_scaled((g * a).mean(0).clamp_min(0)) for g, a in pairs])


def _attribution(seen: Attended) -> Tensor:
    relevance = seen.read
    for gradient, weights in zip(reversed(seen.gradients), reversed(seen.weights), strict=True):
        relevance = relevance + relevance @ (gradient * weights).clamp_min(0).mean(0)
    return _on_grid(relevance, seen.layout)


def _legrad(subject: Subject, targets: Sequence[ResolvedTarget]) -> Tensor:
    by_target, layout = layer_gradients(subject, targets)
    return torch.stack(
        [
            _on_grid(torch.stack([g.clamp_min(0).mean((0, 1)) for g in layers]).mean(0), layout)
            for layers in by_target
        ]
    )


def _rolled(seen: Attended, layers: Sequence[Tensor]) -> Tensor:
    """Rows of B_L … B_1 that the scores are made from, without the product of whole matrices."""
    relevance = seen.read
    for layer in reversed(layers):
        relevance = relevance @ layer
    return _on_grid(relevance, seen.layout)


def _row_scaled(attention: Tensor) -> Tensor:
    """B = attention + I, its rows scaled to sum to 1."""
    with_residual = attention + torch.eye(len(attention), device=attention.device)
    return with_residual / with_residual.sum(1, keepdim=True)


def _on_grid(relevance: Tensor, layout: TokenLayout) -> Tensor:
    return layout.to_map(relevance[None, :, None])[0, 0]
