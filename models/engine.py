"""The engine of one device, which turns batches of jobs into outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import cache, partial
from typing import Any

import torch
from msgspec import structs
from torch import Tensor, nn

from models.cuda.staging import Ready
from models.errors import HeatlensError, InvalidOption, UnknownLayer
from models.graphed_pass import run_graphed
from models.outcomes import BatchOutcomes
from models.pairs import Result, SuspendedPair, halves_of, joined, open_parts, rejoined
from models.phases import Phases
from models.preparation.variant import Needs
from models.price import exceeds_step, price
from models.readout import Read, Similarity, columns, plain
from models.registry import ModelRegistry
from models.resolve import not_before_the_head
from models.shared_pass import differentiates_layers, run_shared_pass
from models.sliced_job import bare, sliced_steps
from models.steps import FirstPass, Step, Unbatched
from models.suspended import Suspended, advance, changed_layers
from models.texts import TextEncoder
from models.types import Failure, Job, JobOptions, ModelInfo, Operation, Outcome
from models.warm_model import WarmModel


class Engine:
    """Runs batches on one device. Not thread-safe: one thread owns it and its registry.

    Attributes:
        beat: called now and then in a long run, as a sign of life.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        """Args: the registry whose warm models answer."""
        self._registry = registry
        self.beat: Callable[[], object] = lambda: None

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Run one shared pass for jobs of one model and version, whatever their operations.

        A job whose pass would take too long is only predicted; `advance` runs the rest in parts.

        Returns:
            One entry for each job, in order: its outcome, its typed failure, or, where methods need
            further passes, what `advance` goes on with.

        Raises:
            UnknownModel: the model is not loaded here.
            Exception: the pass itself failed; which job caused it is not known.
        """
        warm = self._registry.get(jobs[0].model, jobs[0].version)
        faults: dict[str, Failure] = {}
        halves: list[Job] = []
        for job in (_labelled(job, warm) for job in jobs):
            own = halves_of(job)
            wrong = [
                fault for half in own if (fault := _fault(half, warm) or _long_label(half, warm))
            ]
            faults |= dict.fromkeys([half.id for half in own], wrong[0]) if wrong else {}
            halves += own
        sound = [_on_its_own(half, warm) for half in halves if half.id not in faults]
        answered = dict(zip([half.id for half in sound], self._answer(warm, sound), strict=True))
        return joined(jobs, (faults.get(half.id) or answered[half.id] for half in halves))

    def advance(self, suspended: Sequence[Suspended | SuspendedPair]) -> list[Result]:
        """Run the next step of several jobs of one model.

        Their costs should add up to about the model's best batch. Returns one entry for each, as
        `run` does.
        """
        parts = [part for item in suspended for part in open_parts(item)]
        fresh = [part for part in parts if isinstance(part.step, FirstPass)]
        others = [part for part in parts if not isinstance(part.step, FirstPass)]
        # First, because a failure leads to another attempt, and steps cannot be run again.
        answered = self._answer(fresh[0].warm, [part.job for part in fresh]) if fresh else []
        results = dict(zip(map(id, fresh), answered, strict=True))
        results |= zip(map(id, others), advance(others, beat=self.beat), strict=True)
        found = iter([results[id(part)] for part in parts])
        return [rejoined(item, found) for item in suspended]

    def _answer(self, warm: WarmModel, jobs: Sequence[Job]) -> list[Outcome | Failure | Suspended]:
        """One pass for all jobs, or for each variant of the model, kind of input and of scores.

        Jobs whose labels are not encoded are answered later.
        """
        # Most jobs of a batch ask for the same.
        is_cut = cache(partial(_is_cut, warm.info))
        firsts = [bare(job) if is_cut(job.operation, job.options) else job for job in jobs]
        parts: dict[tuple[nn.Module, bool, int, int | None], list[int]] = {}
        answered: dict[int, Outcome | Failure | Suspended] = {}
        for i, job in enumerate(firsts):
            if warm.texts is not None and not warm.texts.knows(job.options.labels):
                steps = partial(_encode, warm.texts, job.options.labels, warm.info)
                answered[i] = _start(jobs[i], warm, plain(warm.task), steps)
                continue
            alone = i if warm.largest_batch == 1 else None
            key = warm.module_for(_needs(job)), _is_normalised(job), columns(job), alone
            parts.setdefault(key, []).append(i)
        staged = {key: warm.stage([jobs[i].input for i in rows]) for key, rows in parts.items()}
        for key, rows in parts.items():
            outcomes = _run_together(warm, [firsts[i] for i in rows], key[0], staged[key])
            for row, i in enumerate(rows):
                steps = partial(outcomes.steps, row)
                if firsts[i] is not jobs[i]:
                    run = partial(_alone, warm, read=outcomes.read(row))
                    steps = partial(sliced_steps, warm, jobs[i], (outcomes, row), run)
                answered[i] = _start(jobs[i], warm, outcomes.read(row), steps)
                self.beat()
        return [answered[i] for i in range(len(jobs))]


def _run_together(
    warm: WarmModel, jobs: Sequence[Job], module: nn.Module, images: Ready
) -> BatchOutcomes:
    batch = images()
    shared = run_graphed(warm, jobs, module=module, images=batch)
    if shared is None:
        shared = run_shared_pass(warm, jobs, module=module, images=batch)
    return BatchOutcomes(warm, jobs, shared)


def _alone(warm: WarmModel, job: Job, *, read: Read) -> BatchOutcomes:
    """The first pass of one job, compared with the vector that it was compared with before."""
    if isinstance(read, Similarity):
        job = structs.replace(job, reference=read.reference.cpu().numpy())
    return _run_together(warm, [job], warm.module_for(_needs(job)), warm.stage([job.input]))


def _on_its_own(job: Job, warm: WarmModel) -> Job:
    """A job that shares no pass with the image that it is compared with, if no pass has two."""
    if job.other is None or warm.largest_batch != 1:
        return job
    with torch.inference_mode():
        vector: Tensor = warm.module(warm.normalise(warm.stage([job.other])()))[0]
    return structs.replace(job, reference=vector.float().cpu().numpy())


def _is_cut(info: ModelInfo, operation: Operation, options: JobOptions) -> bool:
    """Whether the shared pass of a job is run in parts."""
    if len(options.layers) * max(1, len(options.targets)) == 1:
        return False
    return exceeds_step(operation, options, info)


def _start(
    job: Job, warm: WarmModel, read: Read, begin: Callable[[Phases], Generator[Step, Any, Outcome]]
) -> Outcome | Failure | Suspended:
    phases = Phases()
    steps = begin(phases)
    try:
        first = next(steps)
    except StopIteration as stop:
        outcome: Outcome = stop.value
        return outcome
    except HeatlensError as error:
        return Failure.of(job.id, error)
    return Suspended(job, warm, read, steps, first, phases)


def _encode(
    texts: TextEncoder, labels: Sequence[str], info: ModelInfo, phases: Phases
) -> Generator[Step, Any, Outcome]:
    """Encode the labels of a job in steps, the last of which leads to its first pass."""
    parts = list(texts.parts(labels))
    image_ms = price("predict", JobOptions(), info).device_ms
    costs = [math.ceil(texts.takes.encoding_ms(part) / image_ms) for part in parts]
    phases.later = [sum(costs)]
    phases.begin("labels")
    for part, cost in zip(parts, costs, strict=True):
        yield Unbatched(partial(texts.encode, part), cost=cost)
    yield FirstPass()
    raise AssertionError("the first pass replaces what leads to it")


def _labelled(job: Job, warm: WarmModel) -> Job:
    """A job that names the classes it is scored for, where they are texts."""
    if warm.texts is None or job.options.labels:
        return job
    options = structs.replace(job.options, labels=warm.info.labels)
    return structs.replace(job, options=options)


def _needs(job: Job) -> Needs:
    """What the job's shared pass needs."""
    options = job.options
    layers = frozenset(options.layers)
    if job.operation == "features":
        differentiated = any(kind.startswith("grad_") for kind in options.kinds)
        layer_inputs = any(kind.endswith("input") for kind in options.kinds)
    else:
        differentiated = differentiates_layers(options.methods)
        layer_inputs = False
    return Needs(
        reads=layers,
        rewrites=changed_layers(job) | (layers if differentiated else frozenset()),
        layer_inputs=layer_inputs,
    )


def _is_normalised(job: Job) -> bool:
    """Whether the job's input is values rather than pixels."""
    return job.input.dtype.kind == "f"


def _fault(job: Job, warm: WarmModel) -> Failure | None:
    """What makes a job unfit, found before the pass so that the rest of its batch is served."""
    height, width, depth = warm.input_shape
    pixels = height, width, depth
    if job.input.shape != ((depth, height, width) if _is_normalised(job) else pixels):
        size = f"{width} x {height} pixels, {depth} channel{'s' if depth > 1 else ''}"
        return Failure.of(job.id, InvalidOption(f"The model takes images of {size}."))
    explained = job.operation == "explain"
    kinds = job.options.kinds if job.operation == "features" else ()
    for i, layer in enumerate(job.options.layers):
        if reason := warm.refusal(layer, spatial=explained, kinds=kinds):
            error = UnknownLayer(f"{layer} cannot be used: {reason}.", field=f"layers.{i}")
            return Failure.of(job.id, error)
        if explained and "cam" in job.options.methods and layer != warm.target_layer:
            return Failure.of(job.id, not_before_the_head(layer, warm.target_layer))
    for i, change in enumerate(job.options.interventions):
        if reason := warm.refusal(change.layer):
            field = f"interventions.{i}.layer"
            error = UnknownLayer(f"{change.layer} cannot be changed: {reason}.", field=field)
            return Failure.of(job.id, error)
        channels = warm.channels(change.layer)
        if channels is None or any(not 0 <= c < channels for c in change.channels):
            limit = "no output to change" if channels is None else f"{channels} channels"
            wrong = InvalidOption(f"{change.layer} has {limit}.", field=f"interventions.{i}")
            return Failure.of(job.id, wrong)
    return None


def _long_label(job: Job, warm: WarmModel) -> Failure | None:
    """The same for labels, whose tokens are counted here alone."""
    long = None if warm.texts is None else warm.texts.too_long(job.options.labels)
    if long is None:
        return None
    place, reason = long
    return Failure.of(job.id, InvalidOption(reason, field=f"labels.{place}"))
