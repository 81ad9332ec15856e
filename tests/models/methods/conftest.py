"""Captures, subjects of long methods, and a driver for their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.capture import Capture
from models.engine import Engine
from models.errors import ERRORS
from models.extractor import Extractor, Tap
from models.head import HeadProbe, probe_head
from models.interventions import changes_for
from models.layers import to_map
from models.readout import plain
from models.steps import Step, Steps, Subject, Unbatched
from models.suspended import Suspended
from models.targets import ResolvedTarget, ScoreWeights, class_scores
from models.types import Failure, Job, JobOptions
from models.warm_model import WarmModel

CaptureOf = Callable[..., Capture]
SubjectOf = Callable[..., Subject]


@dataclass
class Drive:
    """Runs long methods as the engine does: `drive(method(subject), subject)` returns their maps.

    Checks on the way that no step is bigger than the subject's chunk. An error that ended a method
    is raised.

    Attributes:
        taken: the steps of the last call, in order, of all its methods.
    """

    taken: list[Step] = field(default_factory=list)

    def __call__(self, steps: Steps, subject: Subject) -> Tensor:
        """The maps of one method."""
        return self.together([(steps, subject)])[0]

    def together(self, runs: Sequence[tuple[Steps, Subject]]) -> list[Tensor]:
        """The maps of several methods on one model, whose steps share batches."""
        self.taken = []
        results: list[Tensor | None] = [None] * len(runs)
        pending: dict[int, Suspended] = {}
        for i, (steps, subject) in enumerate(runs):
            try:
                job, model = _job(subject, str(i)), _model(subject)
                pending[i] = Suspended(job, model, subject.read, steps, next(steps))
            except StopIteration as stop:
                results[i] = stop.value
        engine = Engine(registry=None)
        while pending:
            for i, entry in pending.items():
                self._check(entry.step, runs[i][1])
            for i, answer in zip(
                list(pending), engine.advance(list(pending.values())), strict=True
            ):
                if isinstance(answer, Failure):
                    raise ERRORS[answer.code](answer.message)
                if answer is not pending[i]:
                    results[i] = answer
                    del pending[i]
        return results

    def _check(self, step: Step, subject: Subject) -> None:
        self.taken.append(step)
        assert step.cost > 0
        if isinstance(step, Unbatched):
            # One target that is differentiated twice is worth up to 24 images.
            assert step.cost <= max(24, subject.chunk)
        else:
            assert 0 < len(step.inputs) <= subject.chunk


def _model(subject: Subject) -> WarmModel:
    """What a step needs to know of the subject's model."""
    known = {"module": subject.module, "task": subject.task, "layouts": subject.layouts}
    known |= {"largest_batch": None}
    return cast("WarmModel", SimpleNamespace(module_for=lambda _: subject.module, **known))


def _job(subject: Subject, name: str) -> Job:
    return Job(
        id=name,
        operation="explain",
        model="net",
        version="1",
        input=np.zeros((1, 1, 3), np.uint8),
        options=JobOptions(interventions=subject.interventions),
    )


@pytest.fixture
def drive() -> Drive:
    return Drive()


@pytest.fixture
def capture_of() -> CaptureOf:
    """`capture_of(net, x, layer, targets)`: (A, g) for the same targets of every image."""
    return _capture


@pytest.fixture
def subject_of() -> SubjectOf:
    """`subject_of(net, x, targets, layer)`: a subject of one image with any options."""
    return _subject


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """`with untouched(net):` fails if the block leaves a hook, a gradient, or another change."""
    return _untouched


def _resolved(targets: Sequence[int | ResolvedTarget]) -> tuple[ResolvedTarget, ...]:
    return tuple(t if isinstance(t, ResolvedTarget) else ResolvedTarget(t) for t in targets)


def _capture(
    net: nn.Module,
    x: Tensor,
    layer: str,
    targets: Sequence[int | ResolvedTarget],
    *,
    layout=None,
    interventions=(),
    task: str = "single_label",
) -> Capture:
    weights = ScoreWeights([_resolved(targets)] * len(x), x.device)
    layouts = {layer: layout}
    taps = [Tap(layer, "output"), Tap(layer, "grad_output")]
    changes = changes_for(layouts, [interventions] * len(x))
    with Extractor(net, taps, changes=changes) as extractor:
        scores = weights.of(class_scores(extractor.forward(x), task)[0])
        gradients = []
        for t in range(weights.width):
            extractor.backward(scores[:, t].sum(), again=True)
            gradients.append(to_map(extractor.caught(layer, "grad_output"), layout))
        activation = to_map(extractor.caught(layer, "output"), layout)
    return Capture(layer, activation, torch.stack(gradients, 1), scores.detach())


def _subject(
    net: nn.Module,
    x: Tensor,
    targets: Sequence[int | ResolvedTarget] = (0,),
    layer: str = "",
    *,
    gradients: bool = True,
    chunk: int = 4,
    samples: int = 0,
    steps: int = 0,
    seed: int = 0,
    interventions=(),
    layouts=None,
    task: str = "single_label",
) -> Subject:
    """Args: a frozen network, its input (3, H, W) or (1, 3, H, W), classes, a layer or none."""
    x = x if x.ndim == 4 else x[None]
    layouts = layouts or ({layer: None} if layer else {})
    head = None
    if layer:
        probe = torch.randn(2, *x.shape[1:], generator=torch.Generator().manual_seed(0))
        head = probe_head(net, layer, layout=layouts.get(layer), task=task, probe=probe)
    with Extractor(net, [], changes=changes_for(layouts, [interventions])) as extractor:
        logits = class_scores(extractor.forward(x), task)[0][0].clone()
    capture = None
    if layer:
        capture = _capture(
            net,
            x,
            layer,
            targets,
            layout=layouts[layer],
            interventions=interventions,
            task=task,
        )
    if capture and head.closed_form and not interventions:
        capture = _closed_form(capture, head, _resolved(targets))
    if capture and not gradients:
        capture = Capture(layer, capture.activation, None, capture.score)
    return Subject(
        module=net,
        task=task,
        read=plain(task),
        layouts=layouts,
        black=torch.full((1, 3, 1, 1), -2.0),
        white=torch.full((1, 3, 1, 1), 2.0),
        interventions=tuple(interventions),
        inputs=x,
        logits=logits,
        targets=_resolved(targets),
        capture=capture,
        layer=layer,
        head=None if interventions else head,
        chunk=chunk,
        samples=samples,
        steps=steps,
        seed=seed,
    )


def _closed_form(capture: Capture, head: HeadProbe, targets) -> Capture:
    """The same with its gradient in the short form that the shared pass gives for such heads."""
    rows = ScoreWeights([targets], capture.activation.device).of_rows(head.weight)
    gradient = rows[..., None, None] / capture.activation[0, 0].numel()
    torch.testing.assert_close(gradient.expand_as(capture.gradient), capture.gradient)
    return Capture(capture.layer, capture.activation, gradient, capture.score)


@contextmanager
def _untouched(net: nn.Module) -> Iterator[None]:
    def state():
        hooks = [
            len(group)
            for module in net.modules()
            for name, group in vars(module).items()
            if name.endswith("_hooks")
        ]
        flags = [module.training for module in net.modules()]
        frozen = [(p.requires_grad, p.grad is None) for p in net.parameters()]
        return hooks, flags, frozen

    before, values = state(), {k: v.clone() for k, v in net.state_dict().items()}
    yield
    assert state() == before
    after = net.state_dict()
    assert list(after) == list(values)
    for name, value in values.items():
        assert torch.equal(value, after[name]), name
