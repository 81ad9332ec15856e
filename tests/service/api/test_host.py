"""The order of decoding and drawing, and what is left when a request is cancelled."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.api import host
from service.api.host import HostWork

pytestmark = pytest.mark.anyio


class Held:
    """One thread that is held until it is released, and the order of what ran after that."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(1)
        self.host = HostWork(self.threads)
        self.gate = threading.Event()
        self.ran: list[str] = []
        self.tasks = [self.add("decode", self.gate.wait)]

    def add(
        self, stage: str, work: Callable[[], object] | str, piece: int = 0
    ) -> asyncio.Task[object]:
        run = {"decode": self.host.decode, "draw": self.host.draw}[stage]
        note = work if callable(work) else lambda: self.ran.append(work)
        return asyncio.create_task(run(note, piece=piece))

    async def finish(self, *tasks: asyncio.Task[object]) -> list[str]:
        await asyncio.sleep(0)
        self.gate.set()
        await asyncio.gather(*self.tasks, *tasks)
        return self.ran


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    made = Held()
    await asyncio.sleep(0)
    yield made
    made.gate.set()
    made.threads.shutdown()


async def test_drawing_comes_before_decoding(held: Held) -> None:
    tasks = [held.add("decode", "decode"), held.add("draw", "draw")]
    assert await held.finish(*tasks) == ["draw", "decode"]


async def test_large_images_are_inspected_before_others_are_decoded(held: Held) -> None:
    decode = held.add("decode", "decode")
    inspect = asyncio.create_task(held.host.inspect(lambda: held.ran.append("inspect")))
    assert await held.finish(decode, inspect) == ["inspect", "decode"]


async def test_a_request_of_many_images_does_not_hold_up_another(held: Held) -> None:
    many = [held.add("decode", f"many {number}", number) for number in range(8)]
    one = held.add("decode", "one")
    order = await held.finish(*many, one)
    assert order.index("one") == 1
    assert [name for name in order if name != "one"] == [f"many {n}" for n in range(8)]


async def test_later_pictures_of_a_large_drawing_wait_for_a_new_image(held: Held) -> None:
    tasks = [held.add("draw", "later", piece=5), held.add("decode", "decode")]
    assert await held.finish(*tasks) == ["decode", "later"]


async def test_cancelled_work_is_not_run_and_leaves_its_place(held: Held) -> None:
    given_up, kept = held.add("decode", "given up"), held.add("decode", "kept")
    await asyncio.sleep(0)
    given_up.cancel()
    assert await held.finish(kept) == ["kept"]
    await asyncio.wait_for(held.add("decode", "next"), 5)


async def test_a_thread_is_free_when_cancelled_work_has_ended_and_not_before(held: Held) -> None:
    held.tasks.pop().cancel()
    waiting = held.add("decode", "waiting")
    await asyncio.sleep(0.01)
    assert not held.ran
    assert await held.finish(waiting) == ["waiting"]


async def test_what_took_long_is_told_before_the_next_begins(held: Held) -> None:
    gate = threading.Event()
    slow = held.add("decode", lambda: time.sleep(1.5 * host._TOGETHER_S))
    held.add("decode", gate.wait)
    try:
        await asyncio.wait_for(held.finish(slow), 5)
    finally:
        gate.set()


async def test_what_work_raises_is_raised_where_it_is_awaited(held: Held) -> None:
    failing, next_ = held.add("decode", [].pop), held.add("decode", "next")
    with pytest.raises(IndexError):
        await held.finish(failing)
    await asyncio.wait_for(next_, 5)
    assert held.ran == ["next"]


async def test_work_that_runs_out_of_items_leaves_no_other_unsettled(held: Held) -> None:
    failing, other = held.add("decode", iter(()).__next__), held.add("decode", "other")
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(held.finish(failing), 5)
    await asyncio.wait_for(other, 5)
