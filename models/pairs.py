"""Jobs that compare two images: a job for each, which share their passes, and one answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import structs

from models.suspended import Suspended
from models.types import Failure, Job, Outcome, Progress

Half = Outcome | Failure | Suspended


@dataclass(frozen=True, eq=False)
class SuspendedPair:
    """A comparison of two images, one of which has further steps at least."""

    job: Job
    halves: tuple[Half, Half]

    @property
    def open(self) -> list[Suspended]:
        """The halves that have further steps."""
        return [half for half in self.halves if isinstance(half, Suspended)]

    @property
    def cost(self) -> int:
        """The number of images that the next steps are worth."""
        return sum(half.cost for half in self.open)

    def progress(self, *, maps: bool) -> Progress:
        """How far the half that is behind has come, for both."""
        behind = self.open[-1].progress(maps=maps)
        return structs.replace(behind, done=2 * behind.done, total=2 * behind.total)


Result = Half | SuspendedPair


def halves_of(job: Job) -> list[Job]:
    """The jobs of a job that compares images, one after the other; other jobs are their own."""
    if job.operation != "compare" or job.other is None:
        return [job]
    first = structs.replace(job, id=f"{job.id}/0", operation="explain")
    return [first, structs.replace(first, id=f"{job.id}/1", input=job.other, other=job.input)]


def open_parts(item: Suspended | SuspendedPair) -> list[Suspended]:
    """What has further steps."""
    return item.open if isinstance(item, SuspendedPair) else [item]


def joined(jobs: Sequence[Job], answers: Iterator[Half]) -> list[Result]:
    """One answer for each job, of those for what `halves_of` made of it."""
    return [
        next(answers) if len(halves_of(job)) == 1 else _join(job, (next(answers), next(answers)))
        for job in jobs
    ]


def rejoined(item: Suspended | SuspendedPair, answers: Iterator[Half]) -> Result:
    """The answer after a step, of those for the item's `open_parts`."""
    if isinstance(item, Suspended):
        return next(answers)
    one, other = (next(answers) if isinstance(h, Suspended) else h for h in item.halves)
    return _join(item.job, (one, other))


def _join(job: Job, halves: tuple[Half, Half]) -> Result:
    for half in halves:
        if isinstance(half, Failure):
            return structs.replace(half, id=job.id)
    one, other = halves
    if isinstance(one, Outcome) and isinstance(other, Outcome):
        explanations = (*one.explanations, *other.explanations)
        return structs.replace(one, id=job.id, explanations=explanations)
    return SuspendedPair(job, halves)
