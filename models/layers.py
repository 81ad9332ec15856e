"""The layers of a model: how outputs lie in the image, and which to explain and describe."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.hooks import HookStack, find_call
from models.probe import Call, Trace

MAX_PREFIX_TOKENS = 16
MAX_FEATURE_LAYERS = 12
MIN_FEATURE_LAYERS = 4

_ROUNDING = 1e-5
_PASSIVE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """How a layer's output lies in the image, when it is not a plain (N, C, h, w) map.

    Attributes:
        grid: (h, w) of the map.
        prefix: class, distillation and register tokens before the patch tokens; without a place, as
            are tokens behind them.
        channels_last: True for (N, h, w, C) outputs, False for tokens (N, prefix + h·w, C).
    """

    grid: tuple[int, int]
    prefix: int = 0
    channels_last: bool = False

    def to_map(self, tensor: Tensor) -> Tensor:
        """Lay a layer's output, or a gradient of its shape, out as a map (N, C, h, w).

        It is a view where torch can make one; tokens without a place are left out.
        """
        if self.channels_last:
            return tensor.permute(0, 3, 1, 2)
        height, width = self.grid
        patches = tensor[:, self.prefix : self.prefix + height * width].transpose(1, 2)
        return patches.reshape(tensor.shape[0], tensor.shape[2], height, width)


def to_map(tensor: Tensor, layout: TokenLayout | None) -> Tensor:
    """Return a layer's output as (N, C, h, w), whatever its layout (None: it is one already)."""
    return tensor if layout is None else layout.to_map(tensor)


Layouts = Mapping[str, TokenLayout | None]


def candidate_layouts(trace: Trace) -> dict[str, tuple[TokenLayout | None, ...]]:
    """Layouts that each output may have by its shape, the likelier first; `prove_layers` decides.

    A 4-D output may be (N, C, h, w) or (N, h, w, C). The tokens of a 3-D output, less a few without
    a place, may fill the grid of a map before it, or a grid of the input's proportions. Which tokens
    have no place is seen where tokens of that number first appear: these are the same for every
    image. Layers whose output has no layout of more than one position are left out.

    Returns:
        By layer name, in the order of the trace; None = plain (N, C, h, w).
    """
    # What a dropout or identity returns first was made by no module: attention weights, heads.
    unseen = {group[0].name for group in trace.groups() if isinstance(group[0].module, _PASSIVE)}
    candidates: dict[str, tuple[TokenLayout | None, ...]] = {}
    grids: dict[tuple[int, int], None] = {}
    placed: dict[int, tuple[int, int] | None] = {}
    for name, call in trace.calls.items():
        shape = () if call.output is None else tuple(call.output.shape)
        if call.output is None or shape[:1] != (len(trace.scores),):
            continue
        layouts: list[TokenLayout | None] = []
        if len(shape) == 3:
            span = placed.get(shape[1]) or _placed_tokens(call.output)
            placed[shape[1]] = span
            layouts += _token_layouts(shape[1], span, grids, trace.input_size)
        elif len(shape) == 4:
            last = TokenLayout(grid=(shape[1], shape[2]), channels_last=True)
            layouts += [None] if _is_grid(shape[2:], trace.input_size) else []
            layouts += [last] if _is_grid(shape[1:3], trace.input_size) else []
            # The input's proportions speak for an order of the dimensions, and prove nothing.
            layouts.sort(key=lambda layout: not _is_similar(shape, layout, trace.input_size))
        if layouts and name not in unseen:
            candidates[name] = tuple(layouts)
            if len(shape) == 4:
                grids[shape[2:4] if layouts[0] is None else shape[1:3]] = None
    return candidates


def _is_grid(grid: Sequence[int], input_size: tuple[int, int]) -> bool:
    """Whether (h, w) can be positions of the input: several each way, no more than its pixels."""
    pairs = zip(grid, input_size, strict=True)
    return all(min(2, side) <= size <= side for size, side in pairs) and max(grid) > 1


def _is_similar(
    shape: Sequence[int], layout: TokenLayout | None, input_size: tuple[int, int]
) -> bool:
    """Whether (h, w) covers the input with one stride in both directions, give or take rounding."""
    height, width = shape[2:4] if layout is None else shape[1:3]
    skew = abs(height * input_size[1] - width * input_size[0])
    return skew <= 2 * abs(input_size[0] - input_size[1])


def _placed_tokens(tokens: Tensor) -> tuple[int, int] | None:
    """First and last but one of the tokens (N, T, C) that differ between images.

    None where all do, or where those that do not lie among the others.
    """
    values = tokens.detach().float()
    size = values.abs().amax()
    differ = (values[1:] - values[:1]).abs().amax((0, 2)) > _ROUNDING * size
    # Tokens that are zero may be any that an activation switched off.
    same = ~differ & (values[0].abs().amax(1) > _ROUNDING * size)
    places = (~same).nonzero().flatten().tolist()
    if not places or len(places) == len(same) or places[-1] - places[0] + 1 != len(places):
        return None
    return places[0], places[-1] + 1


def _token_layouts(
    tokens: int,
    span: tuple[int, int] | None,
    grids: Collection[tuple[int, int]],
    input_size: tuple[int, int],
) -> list[TokenLayout | None]:
    """Grids that the tokens of `span` fill; without one, all tokens but a few at either end."""
    found: dict[TokenLayout | None, None] = {}
    ends = [span] if span else _spans(tokens)
    for first, last in ends:
        for height, width in grids:
            if height * width == last - first:
                found[TokenLayout(grid=(height, width), prefix=first)] = None
    for first, last in ends:
        patches = last - first
        height = round((patches * input_size[0] / input_size[1]) ** 0.5)
        if not height or patches % height:
            continue
        layout = TokenLayout(grid=(height, patches // height), prefix=first)
        shape = (0, height, patches // height)
        if _is_grid(layout.grid, input_size) and _is_similar(shape, layout, input_size):
            found[layout] = None
    return list(found)


def _spans(tokens: int) -> list[tuple[int, int]]:
    """All tokens, all but a few before them, all but a few behind them."""
    few = range(1, min(tokens, MAX_PREFIX_TOKENS + 1))
    return [(0, tokens), *((n, tokens) for n in few), *((0, tokens - n) for n in few)]


def choose_target_layer(trace: Trace, layouts: Layouts) -> str | None:
    """Choose the layer to explain: the last map before the head, by what the probe shows.

    That is the last values which form a map, have a gradient at its positions (a transformer read
    at its class token has none after the last attention), and are neither what a pooling layer
    returned nor already one map per class. Where a block hands on what its last module returned,
    the block is named (`layer4`, `features`).

    Returns:
        A dotted name, or None if there is no such layer.
    """
    class_maps: str | None = None
    classes = trace.scores.shape[1]
    # Never all classes: maps of the others must show no gradient to be told as class maps.
    chosen = sorted({0, (classes - 1) // 2, max(0, classes - 2)})
    for group in reversed(trace.groups()):
        chain = _chain(group, layouts)
        gradient = _gradient(trace, chain[-1], layouts, chosen) if chain else None
        if gradient is None or not bool(gradient.any()):
            continue
        channels = gradient.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
        # A single logit that tells two classes apart has one map.
        if gradient.shape[1] not in (1, classes) or not set(channels) <= set(chosen):
            return chain[-1].name
        class_maps = class_maps or chain[-1].name
    return class_maps


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
