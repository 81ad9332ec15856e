"""`heatlens bench`: load a running service from the command line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from models.types import Operation
from service.cli.bench.load import (
    SWEEP_STAGES,
    Bounds,
    Closed,
    Latency,
    Load,
    Open,
    Sample,
    Summary,
    run_in_loop,
    run_load,
    run_sweep,
    summarise,
)
from service.cli.bench.requests import (
    BenchError,
    Unreachable,
    draw_images,
    image_requests,
    of_megapixels,
    read_images,
)
from service.cli.common import EXIT_SOME_FAILED, EXIT_UNREACHABLE, AsJson, print_json

if TYPE_CHECKING:
    from service.cli.bench.client import Client

EXTRA_MISSING = "heatlens bench needs aiohttp: pip install 'heatlens[bench]'"

_BUSY_CORES = 0.7
_LATE_MS = 20.0


def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="For example http://127.0.0.1:8000.")],
    *,
    clients: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Closed loop with this many clients. [default: 8]"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, max=100_000, help="Open loop: Poisson arrivals per second."),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="1, 8, 16, 32, 64 clients, then 50, 80, 120, 200 % of the best throughput as a rate.",
        ),
    ] = False,
    duration: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Measured seconds of each load.")
    ] = 10.0,
    warmup: Annotated[
        float,
        typer.Option(min=0, max=600, help="Seconds of load before them that are not measured."),
    ] = 1.0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of requests of each load.")
    ] = None,
    operation: Annotated[Operation, typer.Option(help="Endpoint to load.")] = "explain",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-O", metavar="NAME=VALUE", help="Option of the API; may be repeated."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of images to send. [default: drawn images]"
        ),
    ] = None,
    megapixels: Annotated[
        float | None, typer.Option(min=0.01, max=100, help="Size of drawn images. [default: 0.19]")
    ] = None,
    form: Annotated[bool, typer.Option("--form", help="Send images as files of forms.")] = False,
    retries: Annotated[
        int,
        typer.Option(min=0, max=100, help="Send a refused request again, after its Retry-After."),
    ] = 0,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compare each response with the one that its image gets alone."
        ),
    ] = False,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Relative difference that --verify accepts.")
    ] = 0.01,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=600, help="Seconds to wait for a response.")
    ] = 35.0,
    key: Annotated[str | None, typer.Option(envvar="HEATLENS_API_KEY", help="API key.")] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Permit a URL of another machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Load a running service and report throughput, latency and failures.

    `--rate` and the second half of `--sweep` send requests when they are due, regardless of those
    in flight, and latency counts from the due time. The exit code is 1 if no request succeeded, or
    if a response belonged to another request.

    For example:

    - `heatlens bench http://127.0.0.1:8000`
    - `heatlens bench http://127.0.0.1:8000 --clients 32 --duration 30 --verify`
    - `heatlens bench http://127.0.0.1:8000 --rate 50 -O methods=gradcam,layercam -O
      outputs=heatmap`
    - `heatlens bench http://127.0.0.1:8000 --sweep --operation predict --images photos/ --json`
    """
    if sum((clients is not None, rate is not None, sweep)) > 1:
        raise typer.BadParameter("Choose one of --clients, --rate and --sweep.")
    try:
        from service.cli.bench.client import FOREIGN_RESPONSE, WRONG_RESPONSE, Client, parse_url
    except ModuleNotFoundError:
        raise _failure(EXTRA_MISSING, EXIT_SOME_FAILED) from None

    options = _parse_options(option or [])
    try:
        base = parse_url(url, allow_remote=allow_remote)
    except BenchError as error:
        raise typer.BadParameter(str(error), param_hint="URL") from None
    load = None if sweep else Open(rate=rate) if rate else Closed(clients=clients or 8)
    bounds = Bounds(warmup_s=warmup, duration_s=duration, requests=requests)
    console = Console(stderr=True)
    longest_s = (warmup + duration + timeout) * (SWEEP_STAGES if sweep else 1)
    console.print(f"at most {longest_s:.0f} s", style="dim", highlight=False)
    try:
        bodies = read_images(images) if images else _drawn(megapixels)
        to_send = image_requests(bodies, operation=operation, options=options, key=key, form=form)
        client = Client(base, to_send, timeout_s=timeout, retries=retries)
        work = _measure(client, load, bounds, tolerance if verify else None, console)
        summaries, twins = run_in_loop(work)
    except BenchError as error:
        code = EXIT_UNREACHABLE if isinstance(error, Unreachable) else EXIT_SOME_FAILED
        raise _failure(str(error), code) from None
    if as_json:
        print_json(
            {
                "url": url,
                "operation": operation,
                "options": options,
                "images": len(bodies),
                "runs": msgspec.to_builtins(summaries),
            }
        )
    else:
        _print_report(summaries, title=f"{operation}, {len(bodies)} images in turn", twins=twins)
    codes = {code for row in summaries for code in row.codes}
    if not any(row.answered for row in summaries) or codes & {WRONG_RESPONSE, FOREIGN_RESPONSE}:
        raise typer.Exit(EXIT_SOME_FAILED)


def _drawn(megapixels: float | None) -> list[bytes]:
    # Large ones take long to draw.
    return draw_images() if megapixels is None else draw_images(16, size=of_megapixels(megapixels))


def _parse_options(pairs: Sequence[str]) -> dict[str, str]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{pair} is not NAME=VALUE.", param_hint="--option")
        options[name] = value
    return options


def _failure(message: str, code: int) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(message, style="red", markup=False, highlight=False)
    return typer.Exit(code)


async def _measure(
    client: Client, load: Load | None, bounds: Bounds, tolerance: float | None, console: Console
) -> tuple[list[Summary], int | None]:
    """Measure one load, or the sweep if it is None.

    Returns:
        The summaries and, if responses are verified with a tolerance, the number of pairs of images
        with the same response.

    Raises:
        BenchError: the service does not respond correctly before it is under load.
    """
    from service.cli.bench.verify import learn

    async with client:
        await client.check_service()
        twins = None
        if tolerance is not None:
            with console.status(f"sending {len(client.requests)} requests one by one"):
                verifier = await learn(client, tolerance=tolerance)
            client.check, twins = verifier.is_right, verifier.twins()
        with _progress(console) as progress:

            async def measure(load: Load) -> Summary:
                return await _measure_load(client, load, bounds, progress)

            if load is not None:
                return [await measure(load)], twins
            return [summary async for summary in run_sweep(measure)], twins


async def _measure_load(client: Client, load: Load, bounds: Bounds, progress: Progress) -> Summary:
    total_s = bounds.warmup_s + bounds.duration_s
    task = progress.add_task(str(load), total=total_s, responses=0)
    begun, responses = time.monotonic(), 0

    def watch(sample: Sample) -> None:
        nonlocal responses
        responses += sample.ok
        progress.update(task, completed=time.monotonic() - begun, responses=responses)

    run = await run_load(client.call, load, bounds, watch=watch)
    progress.update(task, completed=total_s)
    return summarise(run)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        TextColumn("{task.fields[responses]} responses"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _print_report(summaries: Sequence[Summary], *, title: str, twins: int | None) -> None:
    console = Console()
    console.print(summaries_table(summaries))
    sizes = [row.megabytes for row in summaries if row.answered]
    size = f", responses of {1000 * max(sizes):.0f} kB" if sizes else ""
    console.print(f"{title}{size}", highlight=False)
    if twins:
        console.print(f"[yellow]{twins} pairs of images have the same response.[/]")


def summaries_table(summaries: Sequence[Summary]) -> RenderableType:
    """One row for each run, then its failures and the doubts about its numbers.

    The column `client` is the processor cores that the load generator used.
    """
    names = ("responses/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "succeeded", "failed", "client")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("load", no_wrap=True), *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in summaries:
        table.add_row(
            row.load,
            f"{row.throughput:.1f}",
            *_cells(row.latency),
            str(row.answered),
            f"[red]{row.failed}[/]" if row.failed else "0",
            f"{row.client_cores:.2f}",
        )
    failures = [_failures(row) for row in summaries if row.failed]
    doubts = [f"[yellow]{doubt}[/]" for row in summaries for doubt in _doubts(row)]
    attempts = [_attempts(row) for row in summaries if len(row.attempts) > 1]
    return Group(table, *attempts, *failures, *doubts)


def _cells(latency: Latency | None) -> list[str]:
    """The cells of a row's latency, in the order of its fields."""
    return [f"{ms:.1f}" for ms in msgspec.structs.astuple(latency)] if latency else ["-"] * 4


def _failures(row: Summary) -> str:
    codes = ", ".join(f"{count} {escape(code)}" for code, count in row.codes.items())
    p99 = f", p99 {row.refused_latency.p99:.0f} ms" if row.refused_latency else ""
    return f"{row.load}: {codes}{p99}"


def _attempts(row: Summary) -> str:
    counts = ", ".join(f"{count} at attempt {number}" for number, count in row.attempts.items())
    return f"{row.load}: succeeded {counts}"


def _doubts(row: Summary) -> Iterator[str]:
    if row.client_cores > _BUSY_CORES:
        yield f"{row.load}: the load generator used {row.client_cores:.2f} cores itself."
    if row.lag_ms > _LATE_MS:
        yield f"{row.load}: 1 % of the requests were sent {row.lag_ms:.0f} ms late or more."
