"""Decoding and drawing in threads: what was begun is finished before more is begun."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

_PIECE_S = 0.05
# For so long a thread goes on with what waits before it tells the event loop what it has done: each
# turn of the loop takes the interpreter's lock and the caches of a core from the threads.
_TOGETHER_S = 0.02


class HostWork:
    """Hands work to threads in a fair order: what is waiting goes to the next one that is free.

    To draw an image that had its time on a device comes before all else. The rest comes in order of
    arrival, where each piece of a request but its first counts as if it had arrived a little later
    than the one before: a request of many images, or of many pictures, does not hold up others.

    Args:
        threads: where work is done.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        # Threads take from it while the loop adds: heapq is atomic for tuples that two numbers sort.
        self._waiting: list[tuple[float, int, Callable[[], Any], asyncio.Future[Any]]] = []
        self._sequence = itertools.count()

    async def inspect(self, work: Callable[[], T]) -> T:
        """Run work that is too short to wait for its turn."""
        return await self._submit(work, order=-math.inf)

    async def decode(self, work: Callable[[], T], *, piece: int = 0) -> T:
        """Run work that begins an image; `piece` is its number among those of its request."""
        return await self._submit(work, order=time.monotonic() + _PIECE_S * piece)

    async def draw(self, work: Callable[[], T], *, piece: int = 0) -> T:
        """Run work on an image that had its time on a device."""
        order = time.monotonic() + _PIECE_S * piece if piece else -math.inf
        return await self._submit(work, order=order)

    async def _submit(self, work: Callable[[], T], *, order: float) -> T:
        """Run work in a thread when it is its turn; the lowest order is the first."""
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (order, next(self._sequence), work, result))
        self._threads.submit(self._run_waiting)
        return await result

    def _run_waiting(self) -> None:
        """Run what waits, for a short while, and tell the loop of all of it at once."""
        ended: list[tuple[asyncio.Future[Any], Callable[[Any], None], object]] = []
        until = time.monotonic() + _TOGETHER_S
        # Other calls may have taken what this one was made for.
        with contextlib.suppress(IndexError):
            while not ended or time.monotonic() < until:
                *_, work, result = heapq.heappop(self._waiting)
                if result.cancelled():
                    continue
                try:
                    ended.append((result, result.set_result, work()))
                except StopIteration as error:
                    # No future takes one, and those that ended with it would be left unsettled.
                    ended.append((result, result.set_exception, RuntimeError(repr(error))))
                except BaseException as error:  # noqa: BLE001 # raised again where it is awaited
                    ended.append((result, result.set_exception, error))
        if ended:
            # The loop may have been closed meanwhile.
            with contextlib.suppress(RuntimeError):
                ended[0][0].get_loop().call_soon_threadsafe(_settle, ended)


def _settle(ended: Sequence[tuple[asyncio.Future[Any], Callable[[Any], None], object]]) -> None:
    for result, settle, outcome in ended:
        if not result.cancelled():
            settle(outcome)
