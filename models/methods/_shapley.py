"""Second-order weights of ShapleyCAM, from a Hessian-vector product with the activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.extractor import Extractor
from models.layers import to_map
from models.steps import Subject
from models.targets import ResolvedTarget, ScoreWeights, log_probabilities

_SPACE = (-2, -1)


def curved_weights(subject: Subject, targets: Sequence[ResolvedTarget]) -> Tensor:
    """Weights (n, K) for n targets: one pass of n copies, differentiated twice after the layer.

    Memory: the graph of what follows the layer, twice, for n images.
    """
    starts: list[Tensor] = []

    def cut(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        starts.append(output.detach().float().requires_grad_())
        # A copy: what follows may work in place.
        return starts[-1].to(output.dtype, copy=True)

    inputs = subject.inputs.expand(len(targets), -1, -1, -1)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    changes = [*subject.changes(len(targets)), (subject.layer, cut)]
    # The fused kernels of attention cannot be differentiated twice.
    with (
        Extractor(subject.module, [], changes=changes) as extractor,
        sdpa_kernel(SDPBackend.MATH),
    ):
        scores, _ = subject.read(extractor.forward(inputs, graph=True))
        pair = _curved(_utility(subject, scores, targets), starts[-1])
    return to_map(pair, subject.layouts.get(subject.layer)).mean(_SPACE)


def linear_curved_weights(subject: Subject, weight: Tensor) -> Tensor:
    """The same (T, K) for a pooled linear head, from the pooled values p alone.

    With u(A) = v(mean A): g_kij = v_k(p) / Z and (H A)_kij = (H_v p)_k / Z at every position.
    """
    activation = subject.captured.activation
    with torch.enable_grad():
        pooled = activation.mean(_SPACE).repeat(len(subject.targets), 1).requires_grad_()
        scores = pooled @ weight.T
        if subject.head is not None and subject.head.bias is not None:
            scores = scores + subject.head.bias
        curved = _curved(_utility(subject, scores, subject.targets), pooled)
        return curved / activation[0, 0].numel()


def _utility(subject: Subject, scores: Tensor, targets: Sequence[ResolvedTarget]) -> Tensor:
    """ReST of each row's own target: its score plus log p of its class, (n, classes) → (n,)."""
    linear = ScoreWeights([[target] for target in targets], scores.device).of(scores)[:, 0]
    classes = torch.tensor([target.cls for target in targets], device=scores.device)
    log_p = log_probabilities(scores, subject.task)
    return linear + log_p.gather(1, classes[:, None])[:, 0]


def _curved(utility: Tensor, start: Tensor) -> Tensor:
    """The value of g - H a / 2 at `start` = a; each utility depends on its own row of a."""
    if not utility.requires_grad:
        return torch.zeros_like(start)
    total = utility.sum()
    (gradient,) = torch.autograd.grad(total, start, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:
        return gradient
    along = (gradient * start.detach()).sum()
    (product,) = torch.autograd.grad(along, start, materialize_grads=True)
    return gradient.detach() - product / 2
