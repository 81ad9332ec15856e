"""Which layers of a model to explain and to describe, of those that are maps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.hooks import HookStack, find_call
from models.layers import Layouts, to_map
from models.probe import Call, Trace, reaches_input

MAX_FEATURE_LAYERS = 12
MIN_FEATURE_LAYERS = 4


def choose_target_layer(trace: Trace, layouts: Layouts) -> str | None:
    """Choose the layer to explain: the last map before the head, by what the probe shows.

    That is the last values which form a map, have a gradient at its positions (a transformer read
    at its class token has none after the last attention), and are neither what a pooling layer
    returned nor already one map per class. Where a block hands on what its last module returned,
    the block is named (`layer4`, `features`).

    Where later maps do not respond to the image where they lie, single branches of a block are passed
    over, too: a part of the evidence does not go through them.

    Returns:
        A dotted name, or None if there is no such layer.
    """
    class_maps = branch = None
    refuted = False
    classes = trace.scores.shape[1]
    # Never all classes: maps of the others must show no gradient to be told as class maps.
    chosen = sorted({0, (classes - 1) // 2, max(0, classes - 2)})
    for group in reversed(trace.groups()):
        chain = _chain(group, layouts)
        refuted = refuted or (not chain and _looks_like_a_map(group[0], trace))
        gradient = _gradient(trace, chain[-1], layouts, chosen) if chain else None
        if gradient is None or not bool(gradient.any()):
            continue
        if refuted and layouts[chain[-1].name] is None and _is_branch(chain[-1], trace):
            branch = branch or chain[-1].name
            continue
        channels = gradient.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
        # A single logit that tells two classes apart has one map.
        if gradient.shape[1] not in (1, classes) or not set(channels) <= set(chosen):
            return chain[-1].name
        class_maps = class_maps or chain[-1].name
    return class_maps or branch


def _looks_like_a_map(call: Call, trace: Trace) -> bool:
    """Whether what a layer returned has the shape of a map (N, C, h, w), and is not pooled."""
    shape = () if call.output is None else call.output.shape
    pooled = "Pool" in type(call.module).__name__
    return len(shape) == 4 and shape[0] == len(trace.probe) and min(shape[2:]) > 1 and not pooled


def _is_branch(call: Call, trace: Trace) -> bool:
    """Whether the scores depend on the image on another way than through a layer's output."""
    return call.output is not None and reaches_input(trace.scores, around=call.output)


def choose_by_value(trace: Trace, layouts: Layouts) -> str | None:
    """The same where no map has a gradient: the last one without which the scores are others.

    What has one map per class is passed over, if there is anything else.
    """
    classes = (1, trace.scores.shape[1])
    class_maps: str | None = None
    for group in reversed(trace.groups()):
        chain = _chain(group, layouts)
        if not chain or not matters(trace, chain[-1].name):
            continue
        output = chain[-1].output
        if output is not None and to_map(output, layouts[chain[-1].name]).shape[1] not in classes:
            return chain[-1].name
        class_maps = class_maps or chain[-1].name
    return class_maps


def matters(trace: Trace, name: str) -> bool:
    """Whether the network's scores change when a layer returns zeros."""

    def nothing(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    module, call = find_call(trace.module, name)
    with torch.inference_mode(), HookStack() as hooks:
        plain = trace.module(trace.probe)
        hooks.forward(module, nothing, call=call)
        return not torch.equal(trace.module(trace.probe), plain)


def has_gradient(trace: Trace, layouts: Layouts, name: str) -> bool:
    """Whether any score of the probe depends on the positions of a map, prefix tokens aside."""
    every = range(trace.scores.shape[1])
    gradient = _gradient(trace, trace.calls[name], layouts, every)
    return gradient is not None and bool(gradient.any())


def _gradient(trace: Trace, call: Call, layouts: Layouts, classes: Sequence[int]) -> Tensor | None:
    """Gradient (N, C, h, w) of a mixture of the classes' scores at a map; None without one."""
    if call.output is None or not (call.output.requires_grad and trace.scores.requires_grad):
        return None
    # Weighted, since plain sums may cancel: two classes of one logit, scores that add up to one.
    weights = torch.arange(1.0, 1 + len(classes), device=trace.scores.device)
    score = (trace.scores[:, list(classes)] * weights).sum()
    try:
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            score, call.output, retain_graph=True, allow_unused=True
        )
    # Quantised operations are recorded, but not differentiated.
    except RuntimeError:
        return None
    return None if gradients[0] is None else to_map(gradients[0], layouts[call.name])


def _chain(group: Sequence[Call], layouts: Layouts) -> list[Call]:
    """The module that made a group's values and the blocks that end with it, the innermost first.

    Empty if the values were made by pooling, or by a projection within an attention (a linear layer
    of tokens).
    """
    producer = group[0]
    # By the name of its type: libraries have pooling layers of their own.
    pooled = "Pool" in type(producer.module).__name__
    tokens = layouts.get(producer.name) is not None
    if pooled or (tokens and isinstance(producer.module, nn.Linear)):
        return []
    blocks = [call for call in group if f"{producer.path}.".startswith(f"{call.path}.")]
    return [call for call in blocks if call.name in layouts]


def feature_layers(trace: Trace, layouts: Layouts) -> tuple[str, ...]:
    """Choose at most 12 maps that are spread over the depth of the model.

    Stages or blocks are preferred to single operations: the tree of maps is cut at one level: the
    deepest cut of 4 to 12 maps, or else the first that has more, thinned evenly. Values that are
    overwritten at once (a convolution before an in-place activation) are left out.
    """
    blocks: dict[str, Sequence[str]] = {}
    for group in trace.groups():
        chain = [call.name for call in _chain(group, layouts) if not call.overwritten]
        blocks |= dict.fromkeys(chain, chain)
    levels = _levels(blocks)
    cut: list[str] = []
    for level in range(1, 1 + max(levels.values(), default=0)):
        deeper = _cut(levels, level)
        if len(deeper) > MAX_FEATURE_LAYERS and len(cut) >= MIN_FEATURE_LAYERS:
            break
        cut = deeper
        if len(cut) > MAX_FEATURE_LAYERS:
            break
    kept = min(len(cut), MAX_FEATURE_LAYERS)
    spread = [cut[round(i * (len(cut) - 1) / max(1, kept - 1))] for i in range(kept)]
    return tuple(_outermost(name, spread, blocks) for name in spread)


def _levels(names: Collection[str]) -> dict[str, int]:
    """How many of the names each name lies within, itself included."""
    return {
        name: 1 + sum(name.startswith(f"{other}.") for other in names if other != name)
        for name in names
    }


def _cut(levels: Mapping[str, int], level: int) -> list[str]:
    """The names of a level, and those above it that no other name lies within."""
    return [
        name
        for name, own in levels.items()
        if own == level
        or (own < level and not any(other.startswith(f"{name}.") for other in levels))
    ]


def _outermost(name: str, chosen: Sequence[str], blocks: Mapping[str, Sequence[str]]) -> str:
    """The outermost block with the values of `name` and no other chosen layer within."""
    return min(
        (
            block
            for block in blocks[name]
            if not any(other != name and other.startswith(f"{block}.") for other in chosen)
        ),
        key=len,
    )
