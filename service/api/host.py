"""Decoding and drawing in threads: what was begun is finished before more is begun."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")
StageName = Literal["decode", "draw"]

_SMOOTHING = 0.1
_PIECE_S = 0.05


class HostWork:
    """Hands work to threads, no more at a time than there are, and the rest in a fair order.

    To draw an image that had its time on a device comes before all else. The rest comes in order of
    arrival, where each piece of a request but its first counts as if it had arrived a little later
    than the one before: a request of many images, or of many pictures, does not hold up others.

    Args:
        threads: where work is done.
        workers: the number of these threads.
    """

    def __init__(self, threads: Executor, *, workers: int) -> None:
        self._threads = threads
        self._workers = self._free = workers
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._sequence = itertools.count()
        self._images: dict[StageName, int] = {"decode": 0, "draw": 0}
        self._seconds: dict[StageName, float] = {"decode": 0.0, "draw": 0.0}

    @property
    def wait_s(self) -> float:
        """Estimated time until the images that were accepted are decoded and drawn."""
        images = self._images.items()
        return sum(count * self._seconds[stage] for stage, count in images) / self._workers

    @contextlib.contextmanager
    def stage(self, name: StageName) -> Iterator[HostStage]:
        """Count an image that needs a stage, until it is through or given up."""
        self._images[name] += 1
        stage = HostStage(self, name)
        try:
            yield stage
            self._observe(name, stage.seconds)
        finally:
            self._images[name] -= 1

    def _observe(self, name: StageName, seconds: float) -> None:
        known = self._seconds[name]
        if seconds:
            self._seconds[name] = known + _SMOOTHING * (seconds - known) if known else seconds

    async def submit(self, work: Callable[[], T], *, order: float) -> T:
        """Run work in a thread when it is its turn; the lowest order is the first."""
        await self._enter(order)
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def finish(ended: Future[T]) -> None:
            self._leave()
            if result.cancelled():
                return
            if ended.cancelled():
                result.cancel()
            elif (error := ended.exception()) is not None:
                result.set_exception(error)
            else:
                result.set_result(ended.result())

        def ended(work: Future[T]) -> None:
            # The loop may have been closed meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(finish, work)

        # A cancelled request leaves its thread when the work has ended, and not before.
        self._threads.submit(work).add_done_callback(ended)
        return await result

    async def _enter(self, order: float) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (order, next(self._sequence), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._leave()
            raise

    def _leave(self) -> None:
        """Give the thread to the next piece of work."""
        while self._waiting:
            turn = heapq.heappop(self._waiting)[-1]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


@dataclass(slots=True)
class HostStage:
    """One stage of one image.

    Attributes:
        seconds: time that it took on a thread.
    """

    host: HostWork
    name: StageName
    seconds: float = 0.0

    async def run(self, work: Callable[[], T], *, piece: int = 0) -> T:
        """Run a piece of work.

        Args:
            work: what is called in a thread.
            piece: its number among the pieces of its request.
        """

        def timed() -> T:
            started = time.monotonic()
            try:
                return work()
            finally:
                self.seconds += time.monotonic() - started

        is_begun = self.name == "draw" and piece == 0
        order = -math.inf if is_begun else time.monotonic() + _PIECE_S * piece
        return await self.host.submit(timed, order=order)
