"""Long methods as generators of bounded steps.

A long method is a generator: it yields a step, is sent the step's result, and returns its maps. The
engine runs each step, together with steps of other jobs on the same model where they can share a
batch; between steps other work is served, deadlines and cancellation are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.capture import Capture
from models.hooks import ForwardHook
from models.interventions import changes_for
from models.warm_model import WarmModel
from models.targets import ResolvedTarget
from models.types import Intervention


@dataclass(frozen=True)
class Forward:
    """Wanted: the scores of every class for `inputs`, float32 (n, classes).

    Attributes:
        inputs: normalised, (n, 3, H, W), on the device; n at most the subject's `chunk`.
    """

    inputs: Tensor

    @property
    def cost(self) -> int:
        """Images in the step."""
        return len(self.inputs)


@dataclass(frozen=True)
class InputGradient:
    """Wanted: (gradients (n, 3, H, W), scores (n,)) of one target's score for each of `inputs`.

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
class LayerGradient:
    """Wanted: the `Capture` of a layer for `inputs`: activation (n, K, h, w), gradient (n, T, K, h, w), scores (n, T).

    Only what follows the layer is differentiated, once for each of the T targets.

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
        """Images in the step, a backward pass counted as two forwards: too much for the layers near the end."""
        return len(self.inputs) * (1 + 2 * len(self.targets))


@dataclass(frozen=True)
class Unbatched:
    """Wanted: what `run` returns; it makes passes with hooks of its own and so shares no batch.

    Attributes:
        run: does at most one batch of work.
        cost: images it is worth.
    """

    run: Callable[[], Any]
    cost: int


Step = Forward | InputGradient | LayerGradient | Unbatched
Steps = Generator[Step, Any, Tensor]


@dataclass(frozen=True)
class Subject:
    """What a long method explains: one image, its targets, one layer.

    Attributes:
        warm: the model.
        interventions: the job's, which every pass made for it must apply (`changes`).
        inputs: normalised, (1, 3, H, W), on the device.
        logits: float32 (classes,), scores of the unperturbed image.
        targets: T targets.
        capture: activation (1, K, h, w) and, if the method asked for it, gradient (1, T, …) at the
            explained layer; None for methods of the input itself.
        layer: dotted name of the explained layer, empty for methods of the input itself.
        chunk: most images in one step.
        samples, steps, seed: as asked, or the method's defaults; 0 where it has none.
    """

    warm: WarmModel
    interventions: tuple[Intervention, ...]
    inputs: Tensor
    logits: Tensor
    targets: tuple[ResolvedTarget, ...]
    capture: Capture | None
    layer: str
    chunk: int
    samples: int
    steps: int
    seed: int

    def changes(self, images: int) -> list[tuple[str, ForwardHook]]:
        """The interventions as the `changes` of an `Extractor` pass over a batch of `images`."""
        return changes_for(self.warm.layouts, [self.interventions] * images)

    def scores(self, logits: Tensor) -> Tensor:
        """Scores of the T targets for logits (n, classes): (n, T)."""
        columns = []
        for target in self.targets:
            column = logits[:, target.cls]
            if target.against:
                column = column - logits[:, list(target.against)].mean(1)
            columns.append(column)
        return torch.stack(columns, 1)

    def generator(self) -> torch.Generator:
        """Random numbers of the subject's seed, on the CPU so that every device draws the same."""
        return torch.Generator().manual_seed(self.seed)
