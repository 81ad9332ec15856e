"""How the outputs of a model's layers may lie in the image."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.probe import Trace

MAX_PREFIX_TOKENS = 16

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
