"""Jobs between two steps, and the batches that steps of several jobs share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.capture import Capture
from models.errors import HeatlensError, InternalError
from models.extractor import Extractor, Tap
from models.interventions import changes_for
from models.layers import TokenLayout, to_map
from models.phases import Phases
from models.preparation.variant import Needs
from models.readout import Read, columns, own_columns, read
from models.steps import Batched, Forward, InputGradient, LayerGradient, Step, Unbatched
from models.targets import ScoreWeights
from models.types import Failure, Job, Outcome, Progress
from models.warm_model import WarmModel

logger = logging.getLogger("heatlens.engine")


@dataclass(eq=False)
class Suspended:
    """A job between steps: its shared pass is done, and its methods need further passes.

    Attributes:
        job: the job.
        warm: its model.
        read: how the network's output is read for it.
        steps: a started generator.
        step: the step that it yielded last.
        phases: what its steps are for.
    """

    job: Job
    warm: WarmModel
    read: Read
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
        changed = changed_layers(self.job)
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


def changed_layers(job: Job) -> frozenset[str]:
    """Layers that every pass for the job changes."""
    return frozenset(change.layer for change in job.options.interventions)


def advance(
    suspended: Sequence[Suspended], *, beat: Callable[[], object]
) -> list[Outcome | Failure | Suspended]:
    """Run the next step of several jobs of one model; steps of the same kind share one batch."""
    execute: dict[type[Step], Callable[[Sequence[Suspended]], list[Any]]] = {
        Forward: _forward,
        InputGradient: _input_gradient,
        LayerGradient: _layer_gradient,
        Unbatched: _unbatched,
    }
    groups: dict[tuple[type[Step], Hashable], list[Suspended]] = {}
    for job in suspended:
        alone = job.job.id if job.warm.largest_batch == 1 else None
        key = type(job.step), (job.module, columns(job.job), alone)
        groups.setdefault(key, []).append(job)
    results: dict[int, Any] = {}
    for (kind, _), group in groups.items():
        results |= dict(zip(map(id, group), execute[kind](group), strict=True))
        beat()
    return [job.resume(results[id(job)]) for job in suspended]


def _forward(group: Sequence[Suspended]) -> list[Tensor]:
    inputs, sizes, changes = _merge(group)
    with Extractor(group[0].module, [], changes=changes) as extractor:
        scored = read([p.read for p in group], extractor.forward(inputs), sizes)
    logits, probabilities = (side.split(sizes) for side in scored)
    wanted = [p.step.probabilities for p in group if isinstance(p.step, Forward)]
    own = [own_columns(p.job) for p in group]
    found = zip(logits, probabilities, wanted, own, strict=True)
    return [(p if w else s)[:, :most] for s, p, w, most in found]


def _input_gradient(group: Sequence[Suspended]) -> list[tuple[Tensor, Tensor]]:
    inputs, sizes, changes = _merge(group)
    steps = [p.step for p in group if isinstance(p.step, InputGradient)]
    targets = [target for step in steps for target in step.targets]
    with Extractor(group[0].module, [], changes=changes) as extractor:
        leaf = inputs.detach().requires_grad_()
        output = extractor.forward(leaf, graph=True)
        logits, _ = read([p.read for p in group], output, sizes)
        scores = ScoreWeights([[t] for t in targets], logits.device).of(logits)[:, 0]
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    return list(zip(gradient.float().split(sizes), scores.detach().split(sizes), strict=True))


def _layer_gradient(group: Sequence[Suspended]) -> list[Capture]:
    warm = group[0].warm
    inputs, sizes, changes = _merge(group)
    steps = [p.step for p in group if isinstance(p.step, LayerGradient)]
    weights = ScoreWeights(
        [s.targets for s, n in zip(steps, sizes, strict=True) for _ in range(n)], inputs.device
    )
    layers = list(dict.fromkeys(step.layer for step in steps))
    with Extractor(group[0].module, _pair_taps(warm, layers), changes=changes) as extractor:
        logits, _ = read([p.read for p in group], extractor.forward(inputs), sizes)
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


def _unbatched(group: Sequence[Suspended]) -> list[Any]:
    return [p.step.run() for p in group if isinstance(p.step, Unbatched)]


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
    parts = [p.step.inputs for p in group if isinstance(p.step, Batched)]
    sizes = [len(part) for part in parts]
    pairs = zip(group, sizes, strict=True)
    rows = [p.job.options.interventions for p, n in pairs for _ in range(n)]
    inputs = torch.cat(parts).contiguous(memory_format=torch.channels_last)
    return inputs, sizes, changes_for(group[0].warm.layouts, rows)
