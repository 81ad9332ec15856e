"""The progress of a request, gathered from the jobs of its images."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from models.imaging.prepare import PreparedImage
from models.types import Explanation, Struct
from service.api.plan import Plan
from service.api.schemas import ProgressEvent
from service.devices.messages import JobProgress


class PartialMap(Struct):
    """What one map of an image shows so far, with what is needed to draw it."""

    image: int
    explanation: Explanation
    source: PreparedImage
    plan: Plan


@dataclass(slots=True)
class _Image:
    """The last news of an image's job, and when they came."""

    news: JobProgress | None = None
    heard: float = 0.0
    is_done: bool = False


@dataclass(slots=True)
class Watch:
    """Hears of the jobs of one request, and tells how far they have come together."""

    _images: list[_Image] = field(default_factory=list)
    _maps: dict[tuple[object, ...], PartialMap] = field(default_factory=dict)

    def start(self, images: int) -> None:
        """Begin to watch so many images, whatever was heard before."""
        self._images = [_Image() for _ in range(images)]
        self._maps.clear()

    def hear(self, image: int, news: JobProgress, source: PreparedImage, plan: Plan) -> None:
        """Take news of an image's job."""
        seen = self._images[image]
        seen.news, seen.heard = news, time.monotonic()
        for item in news.progress.explanations:
            key = (image, item.method, item.layer, item.target.class_id)
            self._maps[key] = PartialMap(image=image, explanation=item, source=source, plan=plan)

    def finish(self, image: int) -> None:
        """An image has its result."""
        self._images[image].is_done = True

    def progress(self) -> ProgressEvent:
        """How far all images have come together."""
        heard = [(i, i.news.progress) for i in self._images if i.news is not None]
        running = [(i, progress) for i, progress in heard if not i.is_done]
        return ProgressEvent(
            what=running[0][1].what if running else "queued",
            done=sum(p.total if i.is_done else p.done for i, p in heard),
            total=sum(p.total for _, p in heard),
            seconds_left=self._seconds_left(),
        )

    def take_maps(self) -> list[PartialMap]:
        """The newest of each map, if it has changed since it was last taken."""
        taken = list(self._maps.values())
        self._maps.clear()
        return taken

    def _seconds_left(self) -> float | None:
        """Time until the last image is done; None while one of them cannot be estimated."""
        now, longest = time.monotonic(), 0.0
        for image in self._images:
            if image.is_done:
                continue
            if image.news is None or image.news.seconds_left is None:
                return None
            longest = max(longest, image.news.seconds_left - (now - image.heard))
        return round(longest, 1) if self._images else None
