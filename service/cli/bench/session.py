"""One benchmark from its plan to its summaries, with progress bars."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from models.types import Struct
from service.cli.bench.address import Address
from service.cli.bench.client import Client, Sample, error_code
from service.cli.bench.connection import ConnectionLost
from service.cli.bench.loops import Bounds, Closed, Open, run_load
from service.cli.bench.pictures import draw_pictures, read_pictures
from service.cli.bench.requests import BenchOperation, Request, picture_requests
from service.cli.bench.summary import Summary, summarise
from service.cli.bench.sweep import STAGES, sweep
from service.cli.bench.verify import DEFAULT_TOLERANCE, learn

_TICK_S = 0.1


class NotAnswering(Exception):
    """The service does not answer the first request; the text says what it did."""


class BenchPlan(Struct, kw_only=True):
    """What is measured.

    Attributes:
        load: one load, or None for the sweep.
        folder: where the pictures are; None draws some.
        options: of the API, put into the query.
        timeout_s: time after which the client gives an answer up.
        verify: whether to check that each answer is its own picture's.
        tolerance: of that check, see `Verifier`.
    """

    address: Address
    load: Closed | Open | None
    bounds: Bounds
    operation: BenchOperation = BenchOperation.EXPLAIN
    options: dict[str, str] = {}
    folder: Path | None = None
    key: str | None = None
    timeout_s: float = 35.0
    verify: bool = False
    tolerance: float = DEFAULT_TOLERANCE

    def longest_s(self) -> float:
        """Bound of the whole measurement without the preparation: every last answer may time out."""
        one = self.bounds.warmup_s + self.bounds.duration_s + self.timeout_s
        return one * (STAGES if self.load is None else 1)


class Report(Struct):
    """What was measured.

    Attributes:
        twins: pairs of pictures whose answers `verify` cannot tell apart; None if it was not asked
            for.
    """

    summaries: list[Summary]
    pictures: int
    twins: int | None = None


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The faster event loop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def run_plan(plan: BenchPlan, *, console: Console) -> Report:
    """Prepare the requests, see that the service answers, and measure.

    Raises:
        NoPictures: the folder has none.
        NotAnswering: the first request fails.
        CannotVerify: a picture has no answer to compare with.
    """
    pictures = draw_pictures() if plan.folder is None else read_pictures(plan.folder)
    requests = picture_requests(
        plan.address, pictures, operation=plan.operation, options=plan.options, key=plan.key
    )
    alone = Client(plan.address, requests, timeout_s=plan.timeout_s)
    await _see_answer(alone, requests[0])
    verifier = None
    if plan.verify:
        with console.status(f"asking for {len(requests)} answers one by one"):
            verifier = await learn(alone, requests, tolerance=plan.tolerance)
    client = Client(
        plan.address,
        requests,
        timeout_s=plan.timeout_s,
        check=verifier.is_right if verifier else None,
    )
    try:
        with _progress(console) as progress:
            summaries = await _measure_all(plan, client, progress)
    finally:
        client.close()
    return Report(
        summaries=summaries,
        pictures=len(pictures),
        twins=verifier.twins() if verifier else None,
    )


async def _see_answer(client: Client, request: Request) -> None:
    try:
        answer = await client.ask(request)
    except ConnectionLost as error:
        raise NotAnswering(f"There is no service that answers: {error}.") from None
    if answer.status != 200:
        raise NotAnswering(f"The service answers with {answer.status} {error_code(answer)}.")


async def _measure_all(plan: BenchPlan, client: Client, progress: Progress) -> list[Summary]:
    async def measure(load: Closed | Open) -> Summary:
        return await measure_load(client, load, plan.bounds, progress=progress)

    if plan.load is not None:
        return [await measure(plan.load)]
    return [summary async for summary in sweep(measure)]


async def measure_load(
    client: Client, load: Closed | Open, bounds: Bounds, *, progress: Progress
) -> Summary:
    """Run one load under a bar that follows the clock."""
    name = f"{load.clients} clients" if isinstance(load, Closed) else f"{load.rate:.1f}/s"
    task = progress.add_task(name, total=bounds.warmup_s + bounds.duration_s, answers=0)
    counted = _Counter()
    ticker = asyncio.create_task(_tick(progress, task, counted))
    try:
        return summarise(await run_load(client, load, bounds, watch=counted.see))
    finally:
        ticker.cancel()
        await asyncio.gather(ticker, return_exceptions=True)
        progress.update(task, completed=bounds.warmup_s + bounds.duration_s, answers=counted.good)


class _Counter:
    good = 0

    def see(self, sample: Sample) -> None:
        self.good += sample.ok


async def _tick(progress: Progress, task: TaskID, counted: _Counter) -> None:
    begun = time.monotonic()
    while True:
        await asyncio.sleep(_TICK_S)
        progress.update(task, completed=time.monotonic() - begun, answers=counted.good)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        TextColumn("{task.fields[answers]} answers"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """Split `NAME=VALUE` pairs.

    Raises:
        ValueError: one has no `=`.
    """
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"{pair}: an option of the API is NAME=VALUE.")
        options[name] = value
    return options
