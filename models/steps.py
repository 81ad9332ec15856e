"""Long methods as generators of bounded steps.

A long method is a generator: it yields a step, is sent the step's result, and returns its maps. The
engine runs each step, together with steps of other jobs on the same model where they can share a
batch; between steps other work is served, and deadlines and cancellation are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.capture import Capture
from models.errors import HeatlensError
from models.head import HeadProbe
from models.hooks import ForwardHook
from models.interventions import changes_for
from models.layers import Layouts
from models.readout import Read
from models.targets import ResolvedTarget
from models.types import Intervention, Task

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What every step may tell about its method.

    Attributes:
        left: cost of the method's steps after this one, where that is not known beforehand.
        maps: makes the maps (T, h, w) of the steps before this one, for methods whose maps take
            shape step by step; called while the step waits.
    """

    left: int | None = None
    maps: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Forward(_Step):
    """Asks for the scores of every class for `inputs`, float32 (n, classes).

    Attributes:
        inputs: normalised, (n, 3, H, W), on the device; n at most the subject's `chunk`.
        probabilities: whether it asks for probabilities instead.
    """

    inputs: Tensor
    probabilities: bool = False

    @property
    def cost(self) -> int:
        """Images in the step."""
        return len(self.inputs)


@dataclass(frozen=True)
class InputGradient(_Step):
    """Asks for gradients (n, 3, H, W) and scores (n,) of one target for each of `inputs`.

    Attributes:
        inputs: normalised, (n, 3, H, W), on the device.
        targets: one for each input.
    """

    inputs: Tensor
    targets: tuple[ResolvedTarget, ...]

    @property
    def cost(self) -> int:
        """Images in the step, a backward pass counted as two forwards."""
        return 3 * len(self.inputs)


@dataclass(frozen=True)
class LayerGradient(_Step):
    """Asks for the `Capture` of a layer for `inputs`.

    Its activation is (n, K, h, w), its gradient (n, T, K, h, w), its scores are (n, T). Only what
    follows the layer is differentiated, once for each of the T targets.

    Attributes:
        inputs: normalised, (n, 3, H, W), on the device.
        layer: dotted name of a layer that is a map.
        targets: T targets, the same for each input.
    """

    inputs: Tensor
    layer: str
    targets: tuple[ResolvedTarget, ...]

    @property
    def cost(self) -> int:
        """Images in the step, a backward pass counted as two forwards even near the end."""
        return len(self.inputs) * (1 + 2 * len(self.targets))


@dataclass(frozen=True)
class Unbatched(_Step):
    """Asks for what `run` returns; it makes passes with its own hooks, so it shares no batch.

    Attributes:
        run: does at most one batch of work.
        cost: the number of images that the work is worth.
    """

    run: Callable[[], Any]
    cost: int


@dataclass(frozen=True)
class FirstPass(_Step):
    """Asks for nothing: the job is ready for its first pass, which answers it anew."""

    cost: int = 1


Batched = Forward | InputGradient | LayerGradient
Step = Batched | Unbatched | FirstPass
Steps = Generator[Step, Any, Tensor]


@dataclass(frozen=True)
class NotedMaps:
    """Maps with a note on each, which a long method may return instead of bare maps.

    Attributes:
        maps: float32 (T, h, w).
        notes: one sentence for each of the T maps; it goes into the explanation's warnings.
    """

    maps: Tensor
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """What a long method explains: one image, its targets, one layer.

    Attributes:
        module: the model, every layer of which can be read and changed.
        task: what its scores mean.
        read: how its output is read as scores.
        layouts: of its layers that are maps.
        black, white: float32 (1, 3, 1, 1), a black and a white pixel as the model takes them.
        interventions: the job's, which every pass made for it must apply (`changes`).
        inputs: normalised, (1, 3, H, W), on the device.
        logits: float32 (classes,), scores of the unperturbed image.
        targets: T targets.
        capture: activation (1, K, h, w) and, if the method asked for it, gradient (1, T, …) at the
            explained layer; None for methods of the input itself.
        layer: dotted name of the explained layer, empty for methods of the input itself.
        head: what follows that layer, where that is known and no intervention may change it.
        chunk: most images in one step.
        samples, steps, seed: as asked, or the method's defaults; 0 where it has none.
    """

    module: nn.Module
    task: Task
    read: Read
    layouts: Layouts
    black: Tensor
    white: Tensor
    interventions: tuple[Intervention, ...]
    inputs: Tensor
    logits: Tensor
    targets: tuple[ResolvedTarget, ...]
    capture: Capture | None
    layer: str
    head: HeadProbe | None
    chunk: int
    samples: int
    steps: int
    seed: int

    @property
    def captured(self) -> Capture:
        """The capture, for methods that explain a layer."""
        if self.capture is None:
            raise ValueError("the method explains a layer")
        return self.capture

    @property
    def linear_head(self) -> Tensor | None:
        """Weight (classes, K) of a head that is exactly pooling and one linear layer.

        None for other heads, and for images whose scores such a head does not give.
        """
        if self.head is None:
            return None
        logits, dtype = self.logits[None], self.inputs.dtype
        holds = self.head.reproduces(self.captured.activation, logits, dtype=dtype)
        return self.head.weight if holds else None

    def changes(self, images: int) -> list[tuple[str, ForwardHook]]:
        """The interventions as the `changes` of an `Extractor` pass over a batch of `images`."""
        return changes_for(self.layouts, [self.interventions] * images)

    def scores(self, logits: Tensor) -> Tensor:
        """Scores of the T targets for logits (n, classes): (n, T)."""
        columns = []
        for target in self.targets:
            column = logits[:, target.cls]
            if target.against:
                column = column - logits[:, list(target.against)].mean(1)
            columns.append(column)
        return torch.stack(columns, 1)

    @property
    def gradient_chunk(self) -> int:
        """Most images in one step that differentiates with respect to the pixels."""
        return max(1, self.chunk // 3)

    def target_chunks(self, *, cost: int) -> Iterator[tuple[ResolvedTarget, ...]]:
        """The targets, as many at a time as one step may hold; each is worth `cost` images."""
        size = max(1, self.chunk // cost)
        for start in range(0, len(self.targets), size):
            yield self.targets[start : start + size]

    def generator(self) -> torch.Generator:
        """Random numbers of the subject's seed, on the CPU so that every device draws the same."""
        return torch.Generator().manual_seed(self.seed)


def run_unbatched(run: Callable[[], T], *, cost: int) -> Generator[Step, T | HeatlensError, T]:
    """Yield one `Unbatched` step and return what `run` returned.

    A typed error that `run` raises is raised here, and so ends one method and not its batch.
    """
    result = yield Unbatched(run=partial(_result_or_error, run), cost=cost)
    if isinstance(result, HeatlensError):
        raise result
    return result


def run_by_targets(
    subject: Subject, run: Callable[[tuple[ResolvedTarget, ...]], Tensor], *, cost: int
) -> Steps:
    """Run unbatched steps of as many targets as fit, and return their rows as one tensor.

    `run` returns a row for each of the targets that it is given; each is worth `cost` images.
    """
    results = []
    for targets in subject.target_chunks(cost=cost):
        step = run_unbatched(partial(run, targets), cost=cost * len(targets))
        results.append((yield from step))
    return torch.cat(results)


def _result_or_error(run: Callable[[], T]) -> T | HeatlensError:
    try:
        return run()
    except HeatlensError as error:
        return error
