"""The one pass that all jobs of a batch share: predictions, captures and statistics."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from models.capture import Capture
from models.cuda.staging import indices
from models.extractor import Extractor, InplaceConflict, Tap
from models.interventions import changes_for
from models.methods import METHODS
from models.readout import Read, read
from models.reductions import Reductions, reduce
from models.targets import ScoreWeights, coded, depth, ranked
from models.types import Job, Kind
from models.warm_model import WarmModel

logger = logging.getLogger("heatlens.engine")

Place = tuple[str, Kind]


@dataclass(frozen=True)
class SharedPass:
    """What the pass gave.

    Attributes:
        inputs: normalised batch (N, 3, H, W), of the dtype that the module takes.
        logits: float32 (N, classes).
        probabilities: float32 (N, classes).
        order: classes of each image, best first, ties by lower index, at least as many as any job
            looks at.
        reads: how the output of each image is read.
        captures: by explained layer, its capture and the batch row of each of its images.
        reductions: by described place, its reductions (for gradients one per target, None without a
            part in the score) and the batch row of each of their images.
        maps: by one-pass method, maps (N, T, h, w) at the target layer that the pass itself made.
    """

    inputs: Tensor
    logits: Tensor
    probabilities: Tensor
    order: Tensor
    reads: list[Read]
    captures: dict[str, tuple[Capture, list[int]]]
    reductions: dict[Place, tuple[list[Reductions | None], list[int]]]
    maps: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Wish:
    """Rows of the batch that want a place's tensor itself, its statistics, or its grids."""

    maps: list[int] = field(default_factory=list)
    statistics: list[int] = field(default_factory=list)
    grid: bool = False


@dataclass(frozen=True)
class _Kept:
    """What a tap keeps, for the rows of its wish."""

    maps: Tensor | None
    reductions: Reductions | None


class ClosedFormRefuted(Exception):
    """The scores of a batch are not what the closed form gives."""


_Catches = dict[Place, _Kept | None]
_Wanted = tuple[Tensor, dict[Place, _Wish], Collection[str]]
"""A batch, the wishes, and the layers whose gradient has the closed form."""


def run_shared_pass(
    warm: WarmModel, jobs: Sequence[Job], *, module: nn.Module, images: Tensor
) -> SharedPass:
    """Run the one pass that answers N jobs of a model.

    `module` is the one of the model's modules that serves the layers of all jobs; `images` are the
    jobs' inputs, all of one kind, on any device.
    """
    inputs = warm.normalise(images, module=module)
    closed = _closed_form_layers(warm, jobs)
    try:
        return _run_either(warm, jobs, module, (inputs, _wishes(jobs, closed), closed))
    except ClosedFormRefuted:
        _warn_once(warm.name, warm.version)
        return _run_either(warm, jobs, module, (inputs, _wishes(jobs, ()), ()))


@cache
def _warn_once(name: str, version: str) -> None:
    logger.warning(
        "%s@%s: the scores of some images are not what pooling and one linear layer give; "
        "their gradients are computed by autograd",
        name,
        version,
    )


def _run_either(
    warm: WarmModel,
    jobs: Sequence[Job],
    module: nn.Module,
    wanted: _Wanted,
) -> SharedPass:
    try:
        return _run(warm, jobs, module, wanted)
    except InplaceConflict:
        return _run(warm, jobs, module, wanted, tensor_hooks_only=True)


def _run(
    warm: WarmModel,
    jobs: Sequence[Job],
    module: nn.Module,
    wanted: _Wanted,
    *,
    tensor_hooks_only: bool = False,
) -> SharedPass:
    inputs, wishes, closed = wanted
    taps = [_tap(warm, place, wish) for place, wish in wishes.items()]
    changes = changes_for(warm.layouts, [job.options.interventions for job in jobs])
    gradients = [place for place in wishes if place[1].startswith("grad_")]
    with Extractor(module, taps, changes=changes, tensor_hooks_only=tensor_hooks_only) as extractor:
        output = extractor.forward(inputs)
        reads = warm.readings(jobs, output)
        logits, probabilities = read(reads, output, [1] * len(jobs))
        order = ranked(
            logits, probabilities, classes=warm.classes, task=warm.task, count=depth(jobs)
        )
        targets = [coded(job.options.targets) for job in jobs]
        weights = ScoreWeights(targets, logits.device, order=order)
        caught: _Catches = {p: extractor.caught(*p) for p in wishes if p not in gradients}
        by_target: list[_Catches] = []
        if gradients:
            rows = sorted({r for p in gradients for r in wishes[p].maps + wishes[p].statistics})
            totals = weights.of(logits)[indices(rows, logits.device)].sum(0)
            for t in range(weights.width):
                extractor.backward(totals[t], again=t + 1 < weights.width)
                by_target.append({place: extractor.caught(*place) for place in gradients})
    logits = logits.detach()
    captures = _captures(warm, (wishes, closed), caught, by_target, (weights, logits))
    if not getattr(module, "pools", False):
        _check_closed_form(warm, closed, captures, (weights, logits))
    return SharedPass(
        inputs=inputs,
        logits=logits,
        probabilities=probabilities,
        order=order,
        reads=reads,
        captures=captures,
        reductions=_reductions(wishes, caught, by_target),
    )


def differentiates_layers(methods: Sequence[str]) -> bool:
    """Whether any of the methods needs gradients at the explained layers from the shared pass."""
    # Methods of the input itself differentiate passes of their own.
    return any(METHODS[name].needs_gradients and not METHODS[name].of_input for name in methods)


def _wishes(jobs: Sequence[Job], closed: Collection[str]) -> dict[Place, _Wish]:
    wishes: dict[Place, _Wish] = {}

    def wish(layer: str, kind: Kind) -> _Wish:
        return wishes.setdefault((layer, kind), _Wish())

    for row, job in enumerate(jobs):
        options = job.options
        differentiated = differentiates_layers(options.methods)
        for layer in options.layers:
            if job.operation == "features":
                for kind in options.kinds:
                    place = wish(layer, kind)
                    place.statistics.append(row)
                    place.grid = place.grid or options.grid
                continue
            if job.operation == "explain":
                wish(layer, "output").maps.append(row)
                if differentiated and layer not in closed:
                    wish(layer, "grad_output").maps.append(row)
            if options.statistics:
                wish(layer, "output").statistics.append(row)
    return wishes


def _closed_form_layers(warm: WarmModel, jobs: Sequence[Job]) -> tuple[str, ...]:
    """Layers whose gradient this batch gets without differentiating."""
    if not any(differentiates_layers(job.options.methods) for job in jobs):
        return ()
    changed = any(job.options.interventions for job in jobs)
    if changed or not warm.head.closed_form or warm.target_layer is None:
        return ()
    return (warm.target_layer,)


def _tap(warm: WarmModel, place: Place, wish: _Wish) -> Tap:
    layer, kind = place
    layout = (warm.input_layouts if kind.endswith("input") else warm.layouts).get(layer)

    def pick(tensor: Tensor, rows: list[int]) -> Tensor:
        return tensor if len(rows) == len(tensor) else tensor[indices(rows, tensor.device)]

    def keep(tensor: Tensor) -> _Kept:
        maps = reductions = None
        if wish.maps:
            chosen = pick(tensor, wish.maps)
            maps = (chosen if layout is None else layout.to_map(chosen)).float()
        if wish.statistics:
            reductions = reduce(
                pick(tensor, wish.statistics),
                channels_last=layout is not None or tensor.ndim == 3,
                keep_maps=wish.grid,
            )
        return _Kept(maps, reductions)

    return Tap(place[0], place[1], keep, shares_memory=bool(wish.maps))


def _captures(
    warm: WarmModel,
    wanted: tuple[dict[Place, _Wish], Collection[str]],
    caught: _Catches,
    by_target: list[_Catches],
    scored: tuple[ScoreWeights, Tensor],
) -> dict[str, tuple[Capture, list[int]]]:
    (wishes, closed), (weights, logits) = wanted, scored
    captures = {}
    for (layer, kind), wish in wishes.items():
        kept = caught.get((layer, kind))
        if kind != "output" or kept is None or kept.maps is None:
            continue
        gradient: Tensor | None = None
        targets, own = _rows(wish.maps, weights, logits)
        differentiated = wishes.get((layer, "grad_output"))
        if differentiated is not None and differentiated.maps:
            gradient = _spread(
                [_maps(target, layer) for target in by_target], kept.maps, wish, differentiated
            )
        elif layer in closed and warm.head.weight is not None:
            pixels = kept.maps.shape[-2] * kept.maps.shape[-1]
            gradient = (targets.of_rows(warm.head.weight) / pixels)[..., None, None]
        capture = Capture(layer, kept.maps, gradient, targets.of(own))
        captures[layer] = (capture, wish.maps)
    return captures


def _check_closed_form(
    warm: WarmModel,
    closed: Collection[str],
    captures: dict[str, tuple[Capture, list[int]]],
    scored: tuple[ScoreWeights, Tensor],
) -> None:
    for layer in closed:
        if layer in captures and warm.head.weight is not None:
            capture, rows = captures[layer]
            targets, logits = _rows(rows, *scored)
            if not warm.head.reproduces(
                capture.activation, logits, dtype=warm.dtype, targets=targets
            ):
                raise ClosedFormRefuted


def _rows(rows: list[int], weights: ScoreWeights, logits: Tensor) -> tuple[ScoreWeights, Tensor]:
    """What belongs to some rows of the batch, without a copy where that is all of them."""
    own = weights.rows(rows)
    return own, logits if own is weights else logits[indices(rows, logits.device)]


def _maps(catches: _Catches, layer: str) -> Tensor | None:
    kept = catches[layer, "grad_output"]
    return None if kept is None else kept.maps


def _spread(
    gradients: list[Tensor | None], activation: Tensor, wish: _Wish, differentiated: _Wish
) -> Tensor:
    """Gradients of each target as (N, T, K, h, w); zero for images that asked for none."""
    zeros = torch.zeros_like(activation)
    if wish.maps == differentiated.maps:
        return torch.stack([zeros if g is None else g for g in gradients], 1)
    places = [wish.maps.index(row) for row in differentiated.maps]
    positions = indices(places, activation.device)
    spread = zeros[:, None].repeat(1, len(gradients), 1, 1, 1)
    for t, gradient in enumerate(gradients):
        if gradient is not None:
            spread[positions, t] = gradient
    return spread


def _reductions(
    wishes: dict[Place, _Wish], caught: _Catches, by_target: Iterable[_Catches]
) -> dict[Place, tuple[list[Reductions | None], list[int]]]:
    described = {}
    for place, wish in wishes.items():
        if wish.statistics:
            catches = by_target if place[1].startswith("grad_") else [caught]
            kept = [catch[place] for catch in catches]
            reductions = [None if k is None else k.reductions for k in kept]
            described[place] = (reductions, wish.statistics)
    return described
