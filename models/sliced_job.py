"""A job whose first pass would take too long, run as a sequence of shorter ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from msgspec import structs

from models.methods import METHODS
from models.outcomes import BatchOutcomes, fuse
from models.phases import Phases
from models.price import first_images, images
from models.slices import slices
from models.steps import Step, run_unbatched
from models.types import Explanation, Job, JobOptions, LayerFeatures, Outcome
from models.warm_model import WarmModel

_Key = tuple[str, int, str]
"""Method, place of the target, layer."""

FirstPass = Callable[[Job], BatchOutcomes]


def bare(job: Job) -> Job:
    """What is left of a job without its explanations and statistics: the prediction."""
    asked = job.options
    options = JobOptions(
        top_k=asked.top_k, targets=(), interventions=asked.interventions, labels=asked.labels
    )
    return structs.replace(job, operation="predict", options=options)


def sliced_steps(
    warm: WarmModel,
    job: Job,
    predicted: tuple[BatchOutcomes, int],
    run: FirstPass,
    phases: Phases,
) -> Generator[Step, Any, Outcome]:
    """Answer a job as `BatchOutcomes.steps` does, each part's first pass a step of its own.

    Args:
        warm: the model.
        job: the job.
        predicted: a batch that has the `bare` job in it, and its row there.
        run: runs the first pass of one job.
        phases: of the job; each part is one.
    """
    options, (outcomes, row) = job.options, predicted
    outcome = yield from outcomes.steps(row, Phases())
    parts = list(slices(job.operation, options, warm.info))
    phases.later = [images(job.operation, part.options, warm.info) for part in parts]
    if options.faithfulness:
        tested = images(job.operation, options, warm.info)
        phases.later.append(max(0, tested - sum(phases.later)))
    found: dict[_Key, Explanation] = {}
    statistics: list[LayerFeatures] = []
    for part in parts:
        phases.begin(part.options.methods[0] if part.options.methods else "statistics")
        answered = yield from _part(warm, structs.replace(job, options=part.options), run)
        keys = _keys(part.options, first_target=part.first_target)
        found |= zip(keys, answered.explanations, strict=True)
        statistics += answered.statistics
    explanations = _in_order(options, found)
    if options.faithfulness:
        phases.begin("faithfulness")
        explanations = yield from outcomes.test(explanations, row, options=options)
    layers, kinds = options.layers, options.kinds
    statistics.sort(key=lambda item: (layers.index(item.layer), kinds.index(item.kind)))
    return structs.replace(outcome, explanations=tuple(explanations), statistics=tuple(statistics))


def _part(warm: WarmModel, job: Job, run: FirstPass) -> Generator[Step, Any, Outcome]:
    cost = first_images(job.operation, job.options, warm.info)
    outcomes = yield from run_unbatched(partial(run, job), cost=cost)
    return (yield from outcomes.steps(0, Phases()))


def _keys(options: JobOptions, *, first_target: int = 0) -> Iterator[_Key]:
    """Names of the explanations of a job without fusion, in their order."""
    for name in options.methods:
        for t in range(len(options.targets)):
            for layer in ("",) if METHODS[name].of_input else options.layers:
                yield name, first_target + t, layer


def _in_order(options: JobOptions, found: dict[_Key, Explanation]) -> list[Explanation]:
    """The explanations in the order method → target → layer, fused if that was asked for."""
    ordered = [(key, found[key]) for key in _keys(options)]
    if options.fuse == "none" or len(options.layers) < 2:
        return [explanation for _, explanation in ordered]
    groups: dict[tuple[str, int], list[Explanation]] = {}
    for (name, target, _), explanation in ordered:
        groups.setdefault((name, target), []).append(explanation)
    return [_fused(group, options) for group in groups.values()]


def _fused(group: Sequence[Explanation], options: JobOptions) -> Explanation:
    first = group[0]
    if len(group) == 1:
        return first
    assert options.fuse != "none"
    maps = [torch.from_numpy(explanation.map)[None] for explanation in group]
    fused = fuse(maps, options.fuse)[0].numpy()
    return structs.replace(
        first,
        layer="+".join(explanation.layer for explanation in group),
        map=fused,
        degenerate=bool(fused.max() == fused.min()),
        warnings=tuple(dict.fromkeys(w for e in group for w in e.warnings)),
    )
