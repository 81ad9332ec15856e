"""Decoding and drawing in threads: what was begun is finished before more is begun."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")

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
        self._free = workers
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._sequence = itertools.count()

    async def decode(self, work: Callable[[], T], *, piece: int = 0) -> T:
        """Run work that begins an image; `piece` is its number among those of its request."""
        return await self._submit(work, order=time.monotonic() + _PIECE_S * piece)

    async def draw(self, work: Callable[[], T], *, piece: int = 0) -> T:
        """Run work on an image that had its time on a device."""
        order = time.monotonic() + _PIECE_S * piece if piece else -math.inf
        return await self._submit(work, order=order)

    async def _submit(self, work: Callable[[], T], *, order: float) -> T:
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
