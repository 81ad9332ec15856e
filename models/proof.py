"""Proofs, on a model's own tensors, of what each of its layers may be used for.

A layer may be read and changed if its first dimension is the image at every size of batch, its
values do not depend on the other images, and it is called once in a pass. It is a map if its
positions respond to the image where they claim to lie: patches of the image are changed one at a
time, and the response of the layer, relative to its mean response, must move with the patch in both
directions. So neither the number of tokens nor the shape of an output decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.hooks import HookStack
from models.layers import TokenLayout, candidate_layouts, to_map
from models.probe import Call, Trace, row_checksum
from models.types import LayerInfo

_ROWS = 3
"""Patches in each direction."""
_PATCH = 7
"""Part of the image's side that a patch covers, as a divisor."""
_LEAST_CORRELATION = 0.6
_LEAST_SLOPE = 0.3
_FEW_POSITIONS = 16
"""Maps of so few positions see the whole image at each: their response cannot be measured."""
_NOISE = 1e-11
"""Energy of a response, relative to that of the map, that may be rounding."""
_CHANNELS = 32
"""Channels that are looked at, evenly spread."""
_COMPANY_TOLERANCE = 1e-3

NOT_THE_IMAGE = "its first dimension is not the image"
SEVERAL_CALLS = "it is called {} times in a pass, so its name does not say which call is meant"
NO_TENSOR = "its output is not one tensor, or quantised"
NOT_A_MAP = "its output is not a map of the image"
ELSEWHERE = "its positions do not lie in the image as their order says"


@dataclass(frozen=True, kw_only=True)
class LayerProof:
    """What was proved of a layer.

    Attributes:
        usable: whether it can be read, described and changed.
        spatial: whether its output is a map of the image, so that it can be explained.
        layout: of the map; None = plain (N, C, h, w).
        reason: why it is not usable, or not spatial; empty if it is both.
    """

    usable: bool
    spatial: bool = False
    layout: TokenLayout | None = None
    reason: str = ""


Proofs = Mapping[str, LayerProof]


def find_layouts(trace: Trace) -> dict[str, TokenLayout | None]:
    """Prove all layers, and return the layout of each that is a map; see `prove_layers`."""
    return layouts_of(prove_layers(trace))


def layouts_of(proofs: Proofs) -> dict[str, TokenLayout | None]:
    """The layout of each layer that was proved to be a map; None = plain (N, C, h, w)."""
    return {name: proof.layout for name, proof in proofs.items() if proof.spatial}


def input_layouts(
    trace: Trace, layouts: Mapping[str, TokenLayout | None]
) -> dict[str, TokenLayout | None]:
    """The layouts of the layers' inputs, by the name of the layer they enter.

    That is the layout of the layer whose output they are, or for channels that come last, that of
    the layer's own output at the same positions.
    """
    produced: dict[tuple[tuple[int, ...], tuple[int, ...]], TokenLayout | None] = {}
    for name, call in trace.calls.items():
        if name in layouts and call.output is not None:
            produced[call.values, tuple(call.output.shape)] = layouts[name]
    found: dict[str, TokenLayout | None] = {}
    for name, call in trace.calls.items():
        own, given = layouts.get(name), (call.input_values, call.input_shape)
        if given in produced:
            found[name] = produced[given]
        elif own is not None and call.output is not None and len(call.input_shape) > 2:
            same_places = call.input_shape[:-1] == tuple(call.output.shape[:-1])
            found |= {name: own} if same_places else {}
    return found


def layer_infos(trace: Trace, proofs: Proofs, *, target_layer: str | None) -> tuple[LayerInfo, ...]:
    """Describe every module that was called, in the order in which the model defines them."""
    return tuple(
        _layer_info(trace.calls[name], proofs[name], recommended=name == target_layer)
        for name in trace.names
    )


def _layer_info(call: Call, proof: LayerProof, *, recommended: bool) -> LayerInfo:
    return LayerInfo(
        name=call.name,
        type=type(call.module).__name__,
        output_shape=() if call.output is None else tuple(call.output.shape[1:]),
        spatial=proof.spatial,
        parameters=sum(parameter.numel() for parameter in call.module.parameters()),
        recommended=recommended,
        calls=call.times,
        usable=proof.usable,
        reason=proof.reason,
    )


def prove_layers(trace: Trace) -> dict[str, LayerProof]:
    """Prove all layers of a traced model on the CPU, in one pass of ten images.

    Returns:
        A proof for each layer of the trace, in its order.
    """
    measured = _measure(trace)
    proofs: dict[str, LayerProof] = {}
    verdicts: dict[str, bool] = {}
    for name, call in trace.calls.items():
        if call.output is None:
            proofs[name] = LayerProof(usable=False, reason=NO_TENSOR)
        elif call.times > 1:
            proofs[name] = LayerProof(usable=False, reason=SEVERAL_CALLS.format(call.times))
        elif name not in measured or not measured[name].agrees_with(call, images=len(trace.probe)):
            proofs[name] = LayerProof(usable=False, reason=NOT_THE_IMAGE)
        else:
            proofs[name] = _spatial_proof(measured[name].localities, verdicts)
    return proofs


@dataclass(frozen=True)
class _Measured:
    """A layer's output for the patched images.

    Attributes:
        rows_are_images: whether it has as many rows as there were images.
        checksum: of its first row, which belongs to the first image of the trace, too.
        localities: by layout that it may have.
    """

    rows_are_images: bool
    checksum: tuple[float, float] | None
    localities: Mapping[TokenLayout | None, _Locality]

    def agrees_with(self, call: Call, *, images: int) -> bool:
        """Whether dimension 0 is the image in both passes, with the same values for the same."""
        if call.output is None or call.output.ndim == 0 or len(call.output) != images:
            return False
        if not self.rows_are_images or self.checksum is None or call.checksum is None:
            return False
        scale = max(map(abs, call.checksum))
        pairs = zip(self.checksum, call.checksum, strict=True)
        return all(abs(a - b) <= _COMPANY_TOLERANCE * scale for a, b in pairs)


def _measure(trace: Trace) -> dict[str, _Measured]:
    candidates = candidate_layouts(trace)
    images, places = _patched(trace.probe[0])
    measured: dict[str, _Measured] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim == 0:
                return
            fits = len(output) == len(images)
            layouts = candidates.get(name, ()) if fits else ()
            found = {layout: _locality(to_map(output, layout), places) for layout in layouts}
            measured[name] = _Measured(fits, row_checksum(output), found)

        return hook

    with torch.inference_mode(), HookStack() as hooks:
        for name, call in trace.calls.items():
            if call.times == 1 and call.output is not None:
                hooks.forward(call.module, record(name))
        trace.module(images.contiguous(memory_format=torch.channels_last))
    return measured


# ---------------------------------------------------------------- locality


@dataclass(frozen=True)
class _Locality:
    """How a layer's response moves with the patch, the worse of both directions.

    Attributes:
        positions: number of the map's positions.
        correlation, slope: of the response's centre against the patch's; None without a response.
    """

    positions: int
    correlation: float | None = None
    slope: float = 0.0

    @property
    def holds(self) -> bool:
        return (
            self.correlation is not None
            and self.correlation >= _LEAST_CORRELATION
            and self.slope >= _LEAST_SLOPE
        )

    @property
    def is_measurable(self) -> bool:
        return self.correlation is not None and self.positions > _FEW_POSITIONS


def _spatial_proof(
    found: Mapping[TokenLayout | None, _Locality], verdicts: dict[str, bool]
) -> LayerProof:
    """The proof of a usable layer.

    Where no response can be measured, because the map has few positions or the layer is constant,
    the layout counts as proved if layers before it were proved in the same kind of layout, and for
    tokens, whose order may change on the way, if the last of them was. `verdicts` keeps that.
    """
    for layout, locality in found.items():
        if locality.holds:
            verdicts[_kind(layout)] = True
            return LayerProof(usable=True, spatial=True, layout=layout)
    for layout, locality in found.items():
        if not locality.is_measurable and verdicts.get(_kind(layout), not verdicts):
            return LayerProof(usable=True, spatial=True, layout=layout)
    if any(_kind(layout) == "tokens" and found[layout].is_measurable for layout in found):
        verdicts["tokens"] = False
    return LayerProof(usable=True, reason=ELSEWHERE if found else NOT_A_MAP)


def _kind(layout: TokenLayout | None) -> str:
    if layout is None:
        return "channels first"
    return "channels last" if layout.channels_last else "tokens"


def _patched(image: Tensor) -> tuple[Tensor, Tensor]:
    """The image and copies with one patch changed; the centres of the patches, (P, 2) in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    channels, height, width = image.shape
    size = (max(1, height // _PATCH), max(1, width // _PATCH))
    images, places = [image], []
    for row in range(_ROWS):
        for column in range(_ROWS):
            top = round((row + 0.5) * height / _ROWS - size[0] / 2)
            left = round((column + 0.5) * width / _ROWS - size[1] / 2)
            changed = image.clone()
            patch = 3 * torch.randn(channels, *size, generator=generator)
            changed[:, top : top + size[0], left : left + size[1]] = patch
            images.append(changed)
            places.append([(top + size[0] / 2) / height, (left + size[1] / 2) / width])
    return torch.stack(images), torch.tensor(places)


def _locality(maps: Tensor, places: Tensor) -> _Locality:
    """Measure how the response of maps (1 + P, C, h, w) moves with the patches at `places`."""
    maps = maps[:, :: max(1, maps.shape[1] // _CHANNELS)].float()
    response = (maps[1:] - maps[:1]).square().sum(1)
    positions = response[0].numel()
    mean = response.mean(0)
    felt, noise = response.sum((1, 2)), _NOISE * maps[0].square().sum()
    if not bool((felt > noise).all()) or not bool(mean.isfinite().all()):
        return _Locality(positions)
    # Where a patch is felt more than patches are on average: global attention is felt everywhere.
    tiny = mean.mean() * 1e-12
    relative = (response + tiny) / (mean + tiny)
    excess = (relative / relative.mean((1, 2), keepdim=True) - 1).clamp_min(0).square()
    total = excess.sum((1, 2))
    correlations, slopes = [], []
    for axis, size in enumerate(maps.shape[-2:]):
        if size == 1:
            continue
        steps = (torch.arange(size) + 0.5) / size
        centre = (excess.sum(2 - axis) * steps).sum(1) / total.clamp_min(1e-30)
        moved, expected = centre - centre.mean(), places[:, axis] - places[:, axis].mean()
        product = (moved * expected).sum()
        correlations.append(float(product / (moved.norm() * expected.norm()).clamp_min(1e-12)))
        slopes.append(float(product / expected.square().sum()))
    if not correlations:
        return _Locality(positions)
    return _Locality(positions, min(correlations), min(slopes))
