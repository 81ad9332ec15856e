"""The engine of one device, which turns batches of jobs into outcomes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.capture import Capture
from models.cuda.staging import Ready
from models.errors import HeatlensError, InternalError, InvalidOption, UnknownLayer
from models.extractor import Extractor, Tap
from models.graphed_pass import run_graphed
from models.interventions import changes_for
from models.layers import TokenLayout, to_map
from models.outcomes import BatchOutcomes
from models.phases import Phases
from models.preparation.variant import Needs
from models.price import exceeds_step
from models.registry import ModelRegistry
from models.resolve import not_before_the_head
from models.shared_pass import differentiates_layers, run_shared_pass
from models.sliced_job import bare, sliced_steps
from models.steps import Forward, InputGradient, LayerGradient, Step, Unbatched
from models.targets import ScoreWeights, class_scores
from models.types import Failure, Job, Outcome, Progress
from models.warm_model import WarmModel

logger = logging.getLogger("heatlens.engine")


@dataclass(eq=False)
class Suspended:
    """A job between steps: its shared pass is done, and its methods need further passes.

    Attributes:
        job: the job.
        warm: its model.
        steps: a started generator.
        step: the step that it yielded last.
        phases: what its steps are for.
    """

    job: Job
    warm: WarmModel
    steps: Generator[Step, Any, Outcome]
    step: Step
    phases: Phases = field(default_factory=Phases)

    @property
    def cost(self) -> int:
        """The number of images that the next step is worth."""
        return self.step.cost

    @property
    def module(self) -> nn.Module:
        """The model's module that the next step runs on."""
        changed = _changed(self.job)
        if isinstance(self.step, LayerGradient):
            read = frozenset({self.step.layer})
            return self.warm.module_for(Needs(reads=read, rewrites=read | changed))
        differentiated = isinstance(self.step, InputGradient)
        return self.warm.module_for(Needs(rewrites=changed, input_gradient=differentiated))

    def progress(self, *, maps: bool) -> Progress:
        """How far the job has come, with what the maps of its method show so far if asked."""
        return self.phases.progress(self.step, maps=maps)

    def resume(self, result: Any) -> Outcome | Failure | Suspended:
        """Go on with the step's result; returns the outcome, or itself with its next step."""
        self.phases.done += self.step.cost
        try:
            self.step = self.steps.send(result)
        except StopIteration as stop:
            outcome: Outcome = stop.value
            return outcome
        except HeatlensError as error:
            return Failure.of(self.job.id, error)
        except Exception:
            # The generator is spent, so the step cannot be tried again: only this job ends.
            logger.exception("a step of job %s failed", self.job.id)
            return Failure.of(self.job.id, InternalError("The explanation failed; see the logs."))
        return self

    def close(self) -> None:
        """Give up; the generator's tensors are released."""
        self.steps.close()


class Engine:
    """Runs batches on one device. Not thread-safe: one thread owns it and its registry.

    Attributes:
        beat: called now and then in a long run, as a sign of life.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        """Args: the registry whose warm models answer."""
        self._registry = registry
        self.beat: Callable[[], object] = lambda: None

    def run(self, jobs: Sequence[Job]) -> list[Outcome | Failure | Suspended]:
        """Run one shared pass for jobs of one model and version, whatever their operations.

        A job whose pass would take too long is only predicted; `advance` runs the rest in parts.

        Returns:
            One entry for each job, in order: its outcome, its typed failure, or, where methods need
            further passes, what `advance` goes on with.

        Raises:
            UnknownModel: the model is not loaded here.
            Exception: the pass itself failed; which job is to blame is not known.
        """
        warm = self._registry.get(jobs[0].model, jobs[0].version)
        faults = {job.id: fault for job in jobs if (fault := _fault(job, warm))}
        sound = [job for job in jobs if job.id not in faults]
        answered = dict(zip([job.id for job in sound], self._answer(warm, sound), strict=True))
        return [faults.get(job.id) or answered[job.id] for job in jobs]

    def advance(self, suspended: Sequence[Suspended]) -> list[Outcome | Failure | Suspended]:
        """Run the next step of several jobs of one model.

        Steps of the same kind share one batch; their costs should add up to about the model's best
        batch. Returns one entry for each, as `run` does.
        """
        execute: dict[type[Step], Callable[[Sequence[Suspended]], list[Any]]] = {
            Forward: self._forward,
            InputGradient: self._input_gradient,
            LayerGradient: self._layer_gradient,
            Unbatched: self._unbatched,
        }
        groups: dict[tuple[type[Step], nn.Module], list[Suspended]] = {}
        for job in suspended:
            groups.setdefault((type(job.step), job.module), []).append(job)
        results: dict[int, Any] = {}
        for (kind, _), group in groups.items():
            results |= dict(zip(map(id, group), execute[kind](group), strict=True))
            self.beat()
        return [job.resume(results[id(job)]) for job in suspended]

    def _answer(self, warm: WarmModel, jobs: Sequence[Job]) -> list[Outcome | Failure | Suspended]:
        """One pass for all jobs, or one for each variant of the model and kind of input."""
        firsts = [bare(job) if _is_cut(job, warm) else job for job in jobs]
        parts: dict[tuple[nn.Module, bool], list[int]] = {}
        for i, job in enumerate(firsts):
            parts.setdefault((warm.module_for(_needs(job)), _is_normalised(job)), []).append(i)
        staged = {key: warm.stage([jobs[i].input for i in rows]) for key, rows in parts.items()}
        answered: dict[int, Outcome | Failure | Suspended] = {}
        for key, rows in parts.items():
            outcomes = _run_together(warm, [firsts[i] for i in rows], key[0], staged[key])
            for row, i in enumerate(rows):
                steps = partial(outcomes.steps, row)
                if firsts[i] is not jobs[i]:
                    run = partial(_alone, warm)
                    steps = partial(sliced_steps, warm, jobs[i], (outcomes, row), run)
                answered[i] = _start(jobs[i], warm, steps)
                self.beat()
        return [answered[i] for i in range(len(jobs))]

    @staticmethod
    def _forward(group: Sequence[Suspended]) -> list[Tensor]:
        inputs, sizes, changes = _merge(group)
        with Extractor(group[0].module, [], changes=changes) as extractor:
            logits, _ = class_scores(extractor.forward(inputs), group[0].warm.task)
        return list(logits.split(sizes))

    @staticmethod
    def _input_gradient(group: Sequence[Suspended]) -> list[tuple[Tensor, Tensor]]:
        inputs, sizes, changes = _merge(group)
        steps = [p.step for p in group if isinstance(p.step, InputGradient)]
        targets = [target for step in steps for target in step.targets]
        with Extractor(group[0].module, [], changes=changes) as extractor:
            leaf = inputs.detach().requires_grad_()
            logits, _ = class_scores(extractor.forward(leaf, graph=True), group[0].warm.task)
            scores = ScoreWeights([[t] for t in targets], logits.device).of(logits)[:, 0]
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        return list(zip(gradient.float().split(sizes), scores.detach().split(sizes), strict=True))

    @staticmethod
    def _layer_gradient(group: Sequence[Suspended]) -> list[Capture]:
        warm = group[0].warm
        inputs, sizes, changes = _merge(group)
        steps = [p.step for p in group if isinstance(p.step, LayerGradient)]
        weights = ScoreWeights(
            [s.targets for s, n in zip(steps, sizes, strict=True) for _ in range(n)], inputs.device
        )
        layers = list(dict.fromkeys(step.layer for step in steps))
        with Extractor(group[0].module, _pair_taps(warm, layers), changes=changes) as extractor:
            logits, _ = class_scores(extractor.forward(inputs), warm.task)
            scores = weights.of(logits)
            activations = {layer: extractor.caught(layer, "output") for layer in layers}
            gradients: dict[str, list[Tensor]] = {layer: [] for layer in layers}
            for t in range(weights.width):
                extractor.backward(scores[:, t].sum(), again=t + 1 < weights.width)
                for layer, caught in gradients.items():
                    gradient = extractor.caught(layer, "grad_output")
                    # The layer may have no part in the score.
                    if gradient is None:
                        gradient = torch.zeros_like(activations[layer])
                    caught.append(gradient)
        captures, start = [], 0
        for step, size in zip(steps, sizes, strict=True):
            rows, width = slice(start, start + size), len(step.targets)
            captures.append(
                Capture(
                    layer=step.layer,
                    activation=activations[step.layer][rows],
                    gradient=torch.stack([g[rows] for g in gradients[step.layer][:width]], 1),
                    score=scores[rows, :width].detach(),
                )
            )
            start += size
        return captures

    @staticmethod
    def _unbatched(group: Sequence[Suspended]) -> list[Any]:
        return [p.step.run() for p in group if isinstance(p.step, Unbatched)]


def _run_together(
    warm: WarmModel, jobs: Sequence[Job], module: nn.Module, images: Ready
) -> BatchOutcomes:
    batch = images()
    shared = run_graphed(warm, jobs, module=module, images=batch)
    if shared is None:
        shared = run_shared_pass(warm, jobs, module=module, images=batch)
    return BatchOutcomes(warm, jobs, shared)


def _alone(warm: WarmModel, job: Job) -> BatchOutcomes:
    return _run_together(warm, [job], warm.module_for(_needs(job)), warm.stage([job.input]))


def _is_cut(job: Job, warm: WarmModel) -> bool:
    """Whether the job's shared pass is run in parts."""
    options = job.options
    if len(options.layers) * max(1, len(options.targets)) == 1:
        return False
    return exceeds_step(job.operation, options, warm.info)


def _start(
    job: Job, warm: WarmModel, begin: Callable[[Phases], Generator[Step, Any, Outcome]]
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
    return Suspended(job, warm, steps, first, phases)


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
        rewrites=_changed(job) | (layers if differentiated else frozenset()),
        layer_inputs=layer_inputs,
    )


def _is_normalised(job: Job) -> bool:
    """Whether the job's input is values rather than pixels."""
    return job.input.dtype.kind == "f"


def _changed(job: Job) -> frozenset[str]:
    """Layers that every pass for the job changes."""
    return frozenset(change.layer for change in job.options.interventions)


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


def _pair_taps(warm: WarmModel, layers: Sequence[str]) -> list[Tap]:
    """Taps of the output and its gradient at each layer, as float32 maps."""
    taps = []
    for layer in layers:
        layout = warm.layouts.get(layer)

        def keep(tensor: Tensor, layout: TokenLayout | None = layout) -> Tensor:
            return to_map(tensor, layout).float()

        taps += [Tap(layer, "output", keep), Tap(layer, "grad_output", keep)]
    return taps


def _merge(group: Sequence[Suspended]) -> tuple[Tensor, list[int], list[Any]]:
    """Inputs of several jobs' steps as one batch, the size of each part, and the interventions."""
    parts = [p.step.inputs for p in group if not isinstance(p.step, Unbatched)]
    sizes = [len(part) for part in parts]
    pairs = zip(group, sizes, strict=True)
    rows = [p.job.options.interventions for p, n in pairs for _ in range(n)]
    inputs = torch.cat(parts).contiguous(memory_format=torch.channels_last)
    return inputs, sizes, changes_for(group[0].warm.layouts, rows)
