"""`heatlens bench`: the generator on the command line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from service.cli.bench.requests import BenchOperation

if TYPE_CHECKING:
    from service.cli.bench.session import BenchPlan

EXIT_FAILED = 1


def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="For example http://127.0.0.1:8000.")],
    *,
    clients: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Closed loop: callers that wait for their answers. [default: 8]"
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, max=100_000, help="Open loop: Poisson arrivals a second."),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="1, 8, 16, 32, 64 clients, then 50, 80, 120 % of the best throughput as a rate.",
        ),
    ] = False,
    duration: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds that each load is measured.")
    ] = 10.0,
    warmup: Annotated[
        float, typer.Option(min=0, max=600, help="Seconds before that which do not count.")
    ] = 1.0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="End each load after so many requests, if earlier.")
    ] = None,
    operation: Annotated[
        BenchOperation, typer.Option(help="What is asked for each picture.")
    ] = BenchOperation.EXPLAIN,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-O", metavar="NAME=VALUE", help="Option of the API; may be repeated."
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder with pictures; drawn ones without."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Check each answer against the one that its picture gets alone."
        ),
    ] = False,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Relative difference that --verify lets pass.")
    ] = 0.01,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=600, help="Seconds after which an answer is given up.")
    ] = 35.0,
    key: Annotated[str | None, typer.Option(envvar="HEATLENS_API_KEY", help="API key.")] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Load another machine than this one.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write the numbers to a file.")
    ] = None,
) -> None:
    """Load a running service and report throughput, latency and failures.

    With `--rate` and in the second half of `--sweep` requests are sent when they are due, whatever
    became of those before them, and latency counts from the due time. The exit code is 1 if nothing
    was answered, or if any answer belonged to another request.

    For example:

    - `heatlens bench http://127.0.0.1:8000`
    - `heatlens bench http://127.0.0.1:8000 --clients 32 --duration 30 --verify`
    - `heatlens bench http://127.0.0.1:8000 --rate 50 -O methods=gradcam,layercam -O
      outputs=heatmap`
    - `heatlens bench http://127.0.0.1:8000 --sweep --operation predict --pictures photos/ --json
      sweep.json`
    """
    if sum((clients is not None, rate is not None, sweep)) > 1:
        raise typer.BadParameter("Choose one of --clients, --rate and --sweep.")
    from service.cli.bench.address import AddressRefused, parse_url
    from service.cli.bench.loops import Bounds, Closed, Open
    from service.cli.bench.session import BenchPlan, parse_options

    load: Closed | Open | None = None
    if rate is not None:
        load = Open(rate=rate)
    elif not sweep:
        load = Closed(clients=clients or 8)
    try:
        address = parse_url(url, allow_remote=allow_remote)
    except AddressRefused as error:
        raise typer.BadParameter(str(error), param_hint="URL") from None
    try:
        options = parse_options(option or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--option") from None
    plan = BenchPlan(
        address=address,
        load=load,
        bounds=Bounds(warmup_s=warmup, duration_s=duration, requests=requests),
        operation=operation,
        options=options,
        folder=pictures,
        key=key,
        timeout_s=timeout,
        verify=verify,
        tolerance=tolerance,
    )
    _run(plan, url=url, json_file=json_file)


def _run(plan: BenchPlan, *, url: str, json_file: Path | None) -> None:
    from service.cli.bench.client import FOREIGN_ANSWER, WRONG_ANSWER
    from service.cli.bench.pictures import NoPictures
    from service.cli.bench.session import NotAnswering, loop_factory, run_plan
    from service.cli.bench.tables import summaries_table
    from service.cli.bench.verify import CannotVerify

    watched = Console(stderr=True)
    watched.print(f"at most {plan.longest_s():.0f} s", style="dim", highlight=False)
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            report = runner.run(run_plan(plan, console=watched))
    except (NoPictures, NotAnswering, CannotVerify) as error:
        watched.print(f"[red]{escape(str(error))}[/]", highlight=False)
        raise typer.Exit(EXIT_FAILED) from None
    console = Console()
    console.print(summaries_table(report.summaries))
    sizes = [row.megabytes for row in report.summaries if row.answered]
    mean = f", answers of {1000 * max(sizes):.0f} kB" if sizes else ""
    console.print(f"{plan.operation}, {report.pictures} pictures in turn{mean}", highlight=False)
    if report.twins:
        console.print(
            f"[yellow]{report.twins} pairs of pictures have answers that are the same.[/]"
        )
    if json_file is not None:
        document = {
            "url": url,
            "operation": plan.operation,
            "options": plan.options,
            "pictures": report.pictures,
            "runs": report.summaries,
        }
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))
    codes = {code for row in report.summaries for code in row.codes}
    if not any(row.answered for row in report.summaries) or codes & {WRONG_ANSWER, FOREIGN_ANSWER}:
        raise typer.Exit(EXIT_FAILED)
