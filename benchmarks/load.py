"""The service under load: throughput against clients, latency against the rate of arrivals, refusals above the limit.

    python -m benchmarks.load
    python -m benchmarks.load --models efficientnet_lite0,resnet50 --precisions fp32,bf16 --duration 15
    python -m benchmarks.load --megapixels 12 --form        # large photographs, as files of forms
    python -m benchmarks.load --slow 64 --retries 5         # beside clients on bad lines
    python -m benchmarks.load --overload 4                  # only the best rate and twice of it, in turns

Starts the service itself, for each model and precision, and measures a closed loop at 1 to 64
clients, then Poisson arrivals at 50, 80, 120 and 200 % of the best throughput (latency counted from the
due time). With `--overload`, 200 % is measured between two measurements of 32 clients, several
times: on a machine that changes its speed only such neighbours compare. Every answer is compared with
the one that its image gets alone. Against a service that runs already: `heatlens bench URL --sweep`.

Takes (9 x (warm-up + duration) + start) for each model and precision: about 2 minutes each; at most
40 s more a load if the service hangs.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.loading import TIMEOUT_S, Measured, images_of, measure
from benchmarks.servers import Server, heatlens, model_entry
from benchmarks.timing import machine_line
from models.types import Operation
from service.cli.bench.client import Client
from service.cli.bench.command import summaries_table
from service.cli.bench.load import (
    SWEEP_STAGES,
    Bounds,
    Closed,
    Load,
    Open,
    Summary,
    run_in_loop,
    run_sweep,
)
from service.cli.bench.requests import Request, image_requests
from service.cli.bench.verify import DEFAULT_TOLERANCE, learn
from service.hardware import available_cores

# As many as have the best rate and none refused: more would wait for longer than the limit where an
# answer takes long.
_CLIENTS_AT_BEST = 32
HALF_TOLERANCE = 0.05  # batches of another size round otherwise


def main(
    *,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "efficientnet_lite0",
    precisions: Annotated[str, typer.Option(help="Of fp32, bf16, fp16.")] = "fp32",
    operation: Annotated[Operation, typer.Option()] = "explain",
    duration: Annotated[float, typer.Option(help="Seconds of each load.")] = 10.0,
    warmup: Annotated[float, typer.Option(help="Seconds before that.")] = 2.0,
    max_wait: Annotated[
        float, typer.Option(help="The service refuses beyond this estimated wait, seconds.")
    ] = 1.0,
    runtime: Annotated[str, typer.Option(help="auto, torch or openvino.")] = "auto",
    devices: Annotated[str, typer.Option(help="As of heatlens serve.")] = "auto",
    http_workers: Annotated[str, typer.Option(help="As of heatlens serve.")] = "auto",
    pictures: Annotated[Path | None, typer.Option(help="Folder; drawn without.")] = None,
    megapixels: Annotated[float | None, typer.Option(help="Size of drawn pictures.")] = None,
    form: Annotated[bool, typer.Option("--form", help="Send pictures as files of forms.")] = False,
    slow: Annotated[int, typer.Option(help="Clients beside the load that send at 5 kB/s.")] = 0,
    retries: Annotated[int, typer.Option(help="Refused requests come again, as told.")] = 0,
    overload: Annotated[
        int, typer.Option(help="Rounds of the best rate and twice of it, in place of the sweep.")
    ] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="One second a load.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers.")] = None,
) -> None:
    """Measure and print one table for each model and precision."""
    console = Console(width=120)
    bounds = Bounds(warmup_s=0.3 if quick else warmup, duration_s=1.0 if quick else duration)
    data = images_of(pictures, count=16 if quick else 64, megapixels=megapixels)
    runs: dict[str, list[Summary]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        cases = [(m, p) for m in models.split(",") for p in precisions.split(",")]
        stages = 1 + 2 * overload if overload else SWEEP_STAGES
        task = progress.add_task("load", total=len(cases) * stages)
        for model, precision in cases:
            title = f"{model} {precision}, {runtime}"
            progress.update(task, description=f"starting {title}")
            with heatlens(
                models=[model_entry(model, precision=precision, runtime=runtime)],
                server={"devices": devices, "http-workers": http_workers},
                settings={"LIMITS__MAX_WAIT_S": str(max_wait)},
            ) as server:
                ready_s = server.wait_ready()
                progress.update(task, description=title)
                found = run_in_loop(
                    _measure_all(
                        server,
                        image_requests(data, operation=operation, form=form),
                        partial(measure, bounds=bounds, slow=slow, retries=retries),
                        tolerance=_tolerance(operation, precision),
                        overload=overload,
                        step=lambda: progress.advance(task),
                    )
                )
                runs[title] = [row.summary for row in found]
                console.print(f"\n[bold]{title}[/], {operation}, ready after {ready_s:.1f} s")
                console.print(summaries_table(runs[title]))
                lines = (
                    overload_findings(runs[title])
                    if overload
                    else findings(found, card=_card(server))
                )
                for line in lines:
                    console.print(line, highlight=False)
    console.print(f"\n{machine_line('torch')}; refused beyond an estimated wait of {max_wait} s")
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(runs), indent=2))


async def _measure_all(
    server: Server,
    requests: list[Request],
    run: Callable[..., Awaitable[Measured]],
    *,
    tolerance: float | None,
    overload: int,
    step: Callable[[], None],
) -> list[Measured]:
    check = None
    if tolerance is not None:
        async with Client(server.url(), requests, timeout_s=TIMEOUT_S) as client:
            check = (await learn(client, tolerance=tolerance)).is_right
    found: list[Measured] = []

    async def one(load: Load) -> Summary:
        found.append(await run(server, requests, load, check=check))
        step()
        return found[-1].summary

    if not overload:
        async for _ in run_sweep(one):
            pass
        return found
    best = await one(Closed(clients=_CLIENTS_AT_BEST))
    for _ in range(overload):
        await one(Open(rate=2 * best.throughput))
        best = await one(Closed(clients=_CLIENTS_AT_BEST))
    return found


def overload_findings(found: list[Summary]) -> list[str]:
    """What becomes of twice the best rate: every second of the loads, between two of the best."""
    above = found[1::2]
    neighbours = zip(above, found[:-1:2], found[2::2], strict=True)
    shares = [2 * row.throughput / (a.throughput + b.throughput) for row, a, b in neighbours]
    refusals = [row.refused_latency.p99 for row in above if row.refused_latency]
    answers = [row.latency.p99 for row in above if row.latency]
    return [
        f"at twice the best rate, median (least to most) of {len(above)}:",
        f"answers over the best throughput {_spread(shares, '.2f')} (target at least 0.90)",
        f"p99 of refusals {_spread(refusals, '.0f')} ms (target at most 50)",
        f"p99 of answers {_spread(answers, '.0f')} ms (target at most twice the limit of the wait)",
    ]


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "-"
    middle, least, most = (
        format(v, form) for v in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({least} to {most})"


def _tolerance(operation: Operation, precision: str) -> float | None:
    """Of the comparison with the answer alone; features have no scores to compare."""
    if operation == "features":
        return None
    return DEFAULT_TOLERANCE if precision == "fp32" else HALF_TOLERANCE


def _card(server: Server) -> dict[str, object]:
    card: dict[str, object] = httpx.get(server.url("/v1/models"), trust_env=False).json()["cards"][
        0
    ]
    return card


def findings(found: list[Measured], *, card: dict[str, object]) -> list[str]:
    """The numbers that the design has targets for."""
    closed = [row for row in found if row.summary.clients is not None]
    arrivals = {row.summary.rate: row.summary for row in found if row.summary.rate is not None}
    best = max(closed, key=lambda row: row.summary.throughput)
    lines = [_share_of_limit(best, card)]
    alone = closed[0].summary.latency
    if alone and arrivals:
        half, above = arrivals[min(arrivals)], arrivals[max(arrivals)]
        if half.latency:
            ratio = half.latency.p99 / alone.p50
            lines.append(f"p99 at 50 % over the unloaded median: {ratio:.1f}x (target at most 3x)")
        refused = above.failed / max(above.answered + above.failed, 1)
        late = f"{above.refused_latency.p99:.0f} ms" if above.refused_latency else "-"
        kept = f"{above.latency.p99:.0f} ms" if above.latency else "-"
        share, left = (above.rate or 0) / best.summary.throughput, above.throughput
        lines.append(
            f"at {share:.0%}: {left / best.summary.throughput:.0%} of the best throughput (target at "
            f"least 90 %), {refused:.0%} refused, p99 of refusals {late} (target at most 50 ms), "
            f"p99 of answers {kept} (target at most twice the limit of the wait)"
        )
    memory = ", ".join(f"{role} {mb:.0f} MB" for role, mb in found[-1].usage.largest_mb.items())
    return [*lines, f"resident memory of the largest process: {memory}"]


def _share_of_limit(best: Measured, card: dict[str, object]) -> str:
    """Throughput over cores / (device time of an image at the best batch + host time of an answer)."""
    latency = {int(size): ms for size, ms in dict(card["latency_ms"]).items()}  # type: ignore[call-overload]
    size = int(str(card["best_batch"]))
    device_ms = latency.get(size, min(ms / n for n, ms in latency.items()) * size) / size
    host_ms = best.by_role.get("http", 0.0) + best.by_role.get("other", 0.0)
    limit = 1000 * available_cores() / (device_ms + host_ms)
    return (
        f"best {best.summary.throughput:.1f}/s = {best.summary.throughput / limit:.0%} of "
        f"{available_cores()} cores / ({device_ms:.1f} ms device at batch {size} + {host_ms:.1f} ms host); "
        f"{best.core_ms:.1f} core-ms an answer in all"
    )


if __name__ == "__main__":
    typer.run(main)
