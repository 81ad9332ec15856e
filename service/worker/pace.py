"""Progress of long jobs between their steps: how far they are, and how long they will take."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Protocol

from models.types import Job, Progress
from service.devices.messages import JobProgress, News

log = logging.getLogger("heatlens.compute")

_NEWS_S = 0.2
_MAPS_S = 1.0
_MEMORY_S = 10.0


class Suspended(Protocol):
    """A long job between two steps, as the engine keeps it."""

    @property
    def job(self) -> Job:
        """The job."""

    @property
    def cost(self) -> int:
        """Images in its next step."""

    def progress(self, *, maps: bool) -> Progress:
        """How far the job has come, with what its maps show so far if asked."""


@dataclass(slots=True)
class Pace:
    """The pace of one job, by the clock: steps of other jobs in between count as well.

    Attributes:
        at: the time of the last step.
        done: images that were done by then.
    """

    at: float
    done: int = 0
    _told: float = -math.inf
    _shown: float = -math.inf
    _seconds: float = 0.0
    _images: float = 0.0

    def news(self, suspended: Suspended, *, wanted: News, now: float) -> JobProgress | None:
        """Note that a step has ended; returns what to tell, which is nothing most of the time."""
        progress = suspended.progress(maps=False)
        self._observe(progress.done, now)
        if now - self._told < _NEWS_S:
            return None
        self._told = now
        if wanted == "maps" and now - self._shown >= _MAPS_S:
            self._shown = now
            progress = _with_maps(suspended, progress)
        return JobProgress(
            job_id=suspended.job.id,
            progress=progress,
            seconds_left=self._seconds_for(progress.total - progress.done),
        )

    def _observe(self, done: int, now: float) -> None:
        passed = now - self.at
        # Old steps count less and less, so that the pace follows a device that is shared.
        kept = math.exp(-passed / _MEMORY_S)
        self._seconds = kept * self._seconds + passed
        self._images = kept * self._images + done - self.done
        self.at, self.done = now, done

    def _seconds_for(self, images: int) -> float | None:
        return images * self._seconds / self._images if self._images else None


def _with_maps(suspended: Suspended, progress: Progress) -> Progress:
    """The progress with maps, or as it is if they cannot be made: the job itself goes on."""
    try:
        return suspended.progress(maps=True)
    except Exception:
        log.exception("the maps so far of job %s could not be made", suspended.job.id)
        return progress
