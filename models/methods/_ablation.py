"""What a score loses when one channel of the explained layer is set to zero."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.extractor import Extractor
from models.hooks import ForwardHook
from models.steps import Step, Subject, Unbatched

# The head is so much cheaper than the backbone that one backbone pass may feed many ablations: of a
# head that begins with pooling as many times the best batch, of another at least so many.
_ROWS = 8
_NONE = -1


def closed_form_drops(subject: Subject) -> Tensor | None:
    """Drops (K, T) from the weights of a linear head: y - y_k = W_ck mean(A_k), without any pass.

    None where this does not hold: the layer is not followed by exactly global average pooling and
    one linear layer, or something after it may be changed.
    """
    linear = subject.linear_head
    if linear is None:
        return None
    return subject.scores(linear.T) * subject.captured.activation[0].mean((1, 2))[:, None]


def replayed_drops(subject: Subject) -> Generator[Step, Any, Tensor]:
    """Drops (K, T) from replays of the head; every row of a pass lacks another channel.

    The backbone runs on one image in each step and its output is spread over the rows at the layer,
    where the network allows it: the first step finds out. Elsewhere every row runs through the
    backbone as well.
    """
    activation = subject.captured.activation[0]
    drops = torch.zeros(len(activation), len(subject.targets), device=activation.device)
    channels = activation.flatten(1).abs().amax(1).nonzero().flatten().tolist()
    if not channels:
        return drops
    spread, whole = yield Unbatched(partial(_begin, subject, channels[0]), cost=2)
    rows = _rows(subject) if spread else subject.chunk
    parts = [channels[first : first + rows] for first in range(0, len(channels), rows)]
    costs = [min(len(part), subject.chunk) for part in parts]
    left = sum(costs)
    for part, cost in zip(parts, costs, strict=True):
        left -= cost
        step = partial(_replay, subject, part, spread=spread)
        logits = yield Unbatched(step, cost=cost, left=left)
        drops[part] = whole - subject.scores(logits)
    return drops


def _rows(subject: Subject) -> int:
    """Ablations that one shared pass feeds, where its batch may grow at the layer."""
    if subject.head is None:
        return subject.chunk
    return _ROWS * subject.chunk if subject.head.kind == "gap" else max(_ROWS, subject.chunk)


def _begin(subject: Subject, channel: int) -> tuple[bool, Tensor]:
    """Whether the batch may grow at the layer, and the untouched scores (1, T).

    The scores of the shared pass would not do: it may have run on a module prepared for speed,
    whose rounding differs by as much as a channel is worth.
    """
    whole = _replay(subject, [_NONE], spread=False)
    if not subject.interventions:
        try:
            grown = _replay(subject, [_NONE, channel], spread=True)
        # What follows may join the layer's output to tensors of one row.
        except (RuntimeError, ValueError, IndexError, AssertionError):
            pass
        else:
            if len(grown) == 2 and _close(grown[0], whole[0], subject.inputs.dtype):
                return True, subject.scores(grown[:1])
    return False, subject.scores(whole)


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether an untouched row has the scores that it has without a changed one."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _replay(subject: Subject, channels: Sequence[int], *, spread: bool) -> Tensor:
    """Scores (n, classes) with another channel set to 0 in each of n rows (`_NONE`: none)."""
    count = len(channels)
    changes = [*subject.changes(count), (subject.layer, _ablate(subject, channels, spread=spread))]
    inputs = subject.inputs if spread else subject.inputs.expand(count, -1, -1, -1)
    with Extractor(subject.module, [], changes=changes) as extractor:
        logits, _ = subject.read(extractor.forward(inputs))
    return logits


def _ablate(subject: Subject, channels: Sequence[int], *, spread: bool) -> ForwardHook:
    layout = subject.layouts.get(subject.layer)
    changed_rows = [row for row, channel in enumerate(channels) if channel != _NONE]
    chosen = [channel for channel in channels if channel != _NONE]

    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        copies = len(channels) if spread else 1
        changed = output.repeat(copies, *[1] * (output.ndim - 1))
        if layout is None:
            changed[changed_rows, chosen] = 0.0
        elif layout.channels_last:
            changed[changed_rows, :, :, chosen] = 0.0
        else:
            # Tokens without a place in the map stay.
            last = layout.prefix + layout.grid[0] * layout.grid[1]
            changed[changed_rows, layout.prefix : last, chosen] = 0.0
        return changed

    return hook
