"""What a benchmark prints: one row a run, what failed, and what makes a number doubtful.

The column `client` is the processor cores that the generator itself kept busy.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from service.cli.bench.summary import Latency, Summary

_BUSY_CORES = 0.7
_LATE_MS = 20.0


def summaries_table(summaries: Sequence[Summary]) -> RenderableType:
    """Throughput, latency and failures of each run, with warnings where the generator itself was the limit."""
    names = ("answers/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "answered", "failed", "client")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("load", no_wrap=True), *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in summaries:
        table.add_row(
            row.load,
            f"{row.throughput:.1f}",
            *_latency_cells(row.latency),
            str(row.answered),
            f"[red]{row.failed}[/]" if row.failed else "0",
            f"{row.client_cores:.2f}",
        )
    failures = [_failures(row) for row in summaries if row.failed]
    doubts = [f"[yellow]{escape(text)}[/]" for text in warnings(summaries)]
    return Group(table, *failures, *doubts)


def warnings(summaries: Sequence[Summary]) -> list[str]:
    """What makes numbers doubtful."""
    found = []
    for row in summaries:
        if row.client_cores > _BUSY_CORES:
            found.append(f"{row.load}: the generator used {row.client_cores:.2f} cores itself.")
        if row.lag_ms > _LATE_MS:
            found.append(
                f"{row.load}: 1 % of the requests were sent {row.lag_ms:.0f} ms late or more."
            )
    return found


def _latency_cells(latency: Latency | None) -> list[str]:
    if latency is None:
        return ["-"] * 4
    return [f"{value:.1f}" for value in (latency.p50, latency.p95, latency.p99, latency.max)]


def _failures(row: Summary) -> str:
    codes = ", ".join(f"{count} {escape(code)}" for code, count in row.codes.items())
    late = f", p99 {row.refused_latency.p99:.0f} ms" if row.refused_latency else ""
    return f"{row.load}: {codes}{late}"
