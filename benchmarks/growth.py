"""How throughput, latency, processor time and memory grow with what is asked.

    python -m benchmarks.growth
    python -m benchmarks.growth --axes clients,methods --duration 8

One axis at a time, all else as a request without options has it, with 8 clients: clients (1 to 64),
image size (0.1 to 12 megapixels), methods (1 to 6), targets (1 to 10), layers of statistics (1 to
20), and the depth of the explained layer (from the first to the last). Processor time an answer is
what to read on a busy machine; it should grow no faster than the work.

Takes 34 loads x (1 s + duration): about 3 minutes; at most 40 s more a load if the service hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.loading import Measured, images_of, measure
from benchmarks.servers import Server, heatlens, model_entry
from benchmarks.timing import machine_line
from models.types import Struct
from service.cli.bench.load import Bounds, Closed, run_in_loop
from service.cli.bench.requests import Request, draw_images, image_requests

CLIENTS = 8
METHODS = ("gradcam", "layercam", "hirescam", "xgradcam", "gradcam_plus_plus", "cam")
MEGAPIXELS = (0.1, 0.5, 1.0, 3.0, 6.0, 12.0)
_ASPECT = 4 / 3


@dataclass(frozen=True)
class Point:
    """One load of an axis: its label, what is sent, and by how many clients."""

    label: str
    requests: Sequence[Request]
    clients: int = CLIENTS


class Row(Struct):
    """One line of a table."""

    label: str
    throughput: float
    p50_ms: float
    p99_ms: float
    core_ms: float
    failed: int
    http_mb: float
    device_mb: float


class Asking:
    """Makes the points of each axis for one running service."""

    def __init__(self, server: Server, data: Sequence[bytes]) -> None:
        self._server = server
        self._data = data

    def clients(self) -> list[Point]:
        """Callers at once."""
        return [Point(str(n), self._explain({}), clients=n) for n in (1, 2, 4, 8, 16, 32, 64)]

    def image_size(self) -> list[Point]:
        """Megapixels of the image that is sent."""
        points = []
        for megapixels in MEGAPIXELS:
            width = round((megapixels * 1e6 * _ASPECT) ** 0.5)
            drawn = draw_images(4, size=(width, round(width / _ASPECT)))
            size = sum(map(len, drawn)) / len(drawn) / 1e6
            label = f"{megapixels} MP, {size:.2f} MB"
            points.append(Point(label, image_requests(drawn)))
        return points

    def methods(self) -> list[Point]:
        """Methods of one request."""
        applicable = self._methods()
        return [
            Point(str(n), self._explain({"methods": ",".join(applicable[:n])}))
            for n in range(1, len(applicable) + 1)
        ]

    def targets(self) -> list[Point]:
        """Classes explained in one request."""
        return [
            Point(str(n), self._explain({"targets": ",".join(f"top{i + 1}" for i in range(n))}))
            for n in (1, 2, 3, 5, 10)
        ]

    def layers(self) -> list[Point]:
        """Layers whose statistics are asked for."""
        return [
            Point(
                str(n),
                image_requests(
                    self._data,
                    operation="features",
                    options={"layers": ",".join(self._spread(n))},
                ),
            )
            for n in (1, 2, 5, 10, 20)
        ]

    def depth(self) -> list[Point]:
        """Where the explained layer lies, from the front."""
        return [Point(name, self._explain({"layers": name})) for name in self._spread(5)]

    def _explain(self, options: dict[str, str]) -> list[Request]:
        return image_requests(self._data, options=options)

    def _methods(self) -> list[str]:
        card = httpx.get(self._server.url("/v1/models"), trust_env=False).json()["cards"][0]
        possible = {row["name"] for row in card["methods"] if row["applicable"]}
        return [name for name in METHODS if name in possible]

    def _spread(self, count: int) -> list[str]:
        """Spatial layers spread evenly over the depth, the last one among them."""
        names = httpx.get(self._server.url("/v1/models"), trust_env=False).json()["models"]
        url = self._server.url(f"/v1/models/{names[0]}/layers")
        rows = [row for row in httpx.get(url, trust_env=False).json() if row["spatial"]]
        chosen = np.linspace(len(rows) - 1, 0, count).round().astype(int)[::-1]
        return list(dict.fromkeys(rows[i]["name"] for i in chosen))


AXES: dict[str, tuple[str, Callable[[Asking], list[Point]]]] = {
    "clients": ("clients", Asking.clients),
    "size": ("image", Asking.image_size),
    "methods": ("methods", Asking.methods),
    "targets": ("targets", Asking.targets),
    "layers": ("layers of statistics", Asking.layers),
    "depth": ("explained layer", Asking.depth),
}


def main(
    *,
    model: Annotated[str, typer.Option()] = "efficientnet_lite0",
    precision: Annotated[str, typer.Option()] = "fp32",
    axes: Annotated[str, typer.Option(help=f"Of {', '.join(AXES)}.")] = ",".join(AXES),
    duration: Annotated[float, typer.Option(help="Seconds of each load.")] = 4.0,
    pictures: Annotated[Path | None, typer.Option(help="Folder; drawn without.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half a second a load.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers.")] = None,
) -> None:
    """Measure and print a table for each axis."""
    console = Console(width=120)
    bounds = Bounds(warmup_s=0.2 if quick else 1.0, duration_s=0.5 if quick else duration)
    data = images_of(pictures, count=32)
    document: dict[str, list[Row]] = {}
    with (
        Progress(console=Console(stderr=True)) as progress,
        heatlens(models=[model_entry(model, precision=precision)]) as server,
    ):
        server.wait_ready()
        asking = Asking(server, data)
        for name in axes.split(","):
            title, points_of = AXES[name]
            points = points_of(asking)
            task = progress.add_task(title, total=len(points))
            rows = document[name] = []
            for point in points:
                load = Closed(clients=point.clients)
                measured = run_in_loop(measure(server, point.requests, load, bounds))
                rows.append(_row(point, measured))
                progress.advance(task)
            console.print(growth_table(title, rows))
    console.print(f"{model} {precision}; {machine_line('torch')}")
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))


def growth_table(title: str, rows: Sequence[Row]) -> Table:
    """One axis: every number, and processor time and latency over those of the first row."""
    table = Table(box=box.MARKDOWN)
    table.add_column(title)
    for name in ("answers/s", "p50 ms", "p99 ms", "core-ms an answer", "http MB", "device MB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.label}{f' ({row.failed} failed)' if row.failed else ''}",
            f"{row.throughput:.1f}",
            f"{row.p50_ms:.1f}",
            f"{row.p99_ms:.1f}",
            f"{row.core_ms:.1f} ({row.core_ms / max(rows[0].core_ms, 1e-9):.2f}x)",
            f"{row.http_mb:.0f}",
            f"{row.device_mb:.0f}",
        )
    return table


def _row(point: Point, measured: Measured) -> Row:
    latency = measured.summary.latency
    memory = measured.usage.largest_mb
    return Row(
        label=point.label,
        throughput=measured.summary.throughput,
        p50_ms=latency.p50 if latency else 0.0,
        p99_ms=latency.p99 if latency else 0.0,
        core_ms=measured.core_ms,
        failed=measured.summary.failed,
        http_mb=memory.get("http", 0.0),
        device_mb=memory.get("device", 0.0),
    )


if __name__ == "__main__":
    typer.run(main)
