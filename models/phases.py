"""The phases of a long job, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from models.steps import Step
from models.types import Explanation, Progress


@dataclass(slots=True)
class Phases:
    """What one job does in its steps: its generator begins the phases, the engine counts the steps.

    Attributes:
        later: costs that are expected of the phases that have not begun, in order.
        what: the current phase: a method, or `faithfulness`.
        done: cost of the steps that were run.
    """

    later: list[int] = field(default_factory=list)
    what: str = ""
    done: int = 0
    _expected: int = 0
    _before: int = 0
    _explain: Callable[[Tensor], Sequence[Explanation]] | None = None

    def begin(
        self, what: str, explain: Callable[[Tensor], Sequence[Explanation]] | None = None
    ) -> None:
        """Begin the next phase; `explain` makes explanations of the maps that its steps show."""
        self.what, self._explain, self._before = what, explain, self.done
        self._expected = self.later.pop(0)

    def progress(self, step: Step, *, maps: bool) -> Progress:
        """How far the job has come before its next step, if asked with what its maps show."""
        left = step.left
        if left is None:
            left = max(0, self._expected - (self.done - self._before) - step.cost)
        return Progress(
            what=self.what,
            done=self.done,
            total=self.done + step.cost + left + sum(self.later),
            explanations=tuple(self._explanations(step)) if maps else (),
        )

    def _explanations(self, step: Step) -> Sequence[Explanation]:
        """Empty where the phase has no map yet."""
        if self._explain is None or step.maps is None or self.done == self._before:
            return ()
        return [item for item in self._explain(step.maps()) if not item.degenerate]
