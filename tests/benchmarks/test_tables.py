"""What the benchmarks conclude from their numbers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.growth import AXES, Row, growth_table
from benchmarks.load import findings, overload_findings
from benchmarks.loading import Measured
from benchmarks.servers import Usage
from service.cli.bench.load import Latency, Summary
from service.hardware import available_cores


def measured(
    throughput: float, p50: float, p99: float, *, clients=None, rate=None, failed=0
) -> Measured:
    latency = Latency(p50=p50, p95=p99, p99=p99, max=p99)
    refused = Latency(p50=3, p95=4, p99=5, max=6) if failed else None
    summary = Summary(
        load="-", clients=clients, rate=rate, seconds=1, throughput=throughput, latency=latency,
        refused_latency=refused, answered=90, failed=failed, statuses={}, codes={}, megabytes=0,
        client_cores=0, lag_ms=0, sent_in_all=1,
    )  # fmt: skip
    usage = Usage(cpu_s={}, rss_mb=300, largest_mb={"http": 80, "device": 200})
    by_role = {"http": 2.0, "device": 9.0, "other": 1.0}
    return Measured(summary=summary, core_ms=12.0, by_role=by_role, usage=usage)


def test_findings_hold_the_numbers_that_have_targets() -> None:
    found = [
        measured(20, 10, 12, clients=1),
        measured(50, 60, 90, clients=8),
        measured(25, 15, 25, rate=25),
        measured(46, 90, 400, rate=100, failed=10),
    ]
    card = {"best_batch": 4, "latency_ms": {"1": 12.0, "4": 28.0}}
    lines = findings(found, card=card)
    limit = 1000 * available_cores() / (28 / 4 + 3)  # 7 ms device, 3 ms host
    assert f"best 50.0/s = {50 / limit:.0%}" in lines[0]
    assert "7.0 ms device at batch 4 + 3.0 ms host" in lines[0]
    assert "2.5x" in lines[1]
    assert "at 200%: 92% of the best" in lines[2]
    assert "10% refused, p99 of refusals 5 ms" in lines[2]
    assert "p99 of answers 400 ms" in lines[2]
    assert "http 80 MB" in lines[3]


def test_overload_is_compared_with_the_best_before_and_after_it() -> None:
    best = [measured(t, 60, 90, clients=64) for t in (100, 80, 100)]
    above = [measured(t, 90, 400, rate=200, failed=10) for t in (81, 90)]
    rows = [row.summary for row in (best[0], above[0], best[1], above[1], best[2])]
    lines = overload_findings(rows)
    assert "best throughput 0.95 (0.90 to 1.00)" in lines[1]
    assert "p99 of refusals 5 (5 to 5) ms" in lines[2]
    assert "p99 of answers 400 (400 to 400) ms" in lines[3]


def test_growth_is_told_over_the_first_row() -> None:
    rows = [
        Row(label=str(n), throughput=10 / n, p50_ms=n, p99_ms=n, core_ms=20.0 + n,
            failed=n - 1, http_mb=80, device_mb=900)
        for n in (1, 22)
    ]  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=120).print(growth_table("methods", rows))
    assert "21.0 (1.00x)" in text.getvalue()
    assert "42.0 (2.00x)" in text.getvalue()
    assert "22 (21 failed)" in text.getvalue()


def test_every_axis_of_the_design_is_there() -> None:
    assert list(AXES) == ["clients", "size", "methods", "targets", "layers", "depth"]


def test_an_axis_makes_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import growth

    class Running:
        def url(self, path: str = "") -> str:
            return path

    class Answered:
        def __init__(self, body: object) -> None:
            self.json = lambda: body

    layers = [{"name": f"block{i}", "spatial": i < 30} for i in range(32)]
    methods = [{"name": name, "applicable": name != "cam"} for name in growth.METHODS]
    answers = {
        "/v1/models": {"models": ["m"], "cards": [{"methods": methods}]},
        "/v1/models/m/layers": layers,
    }
    monkeypatch.setattr(growth.httpx, "get", lambda url, **_: Answered(answers[url]))
    asking = growth.Asking(Running(), [b"image"])
    assert [point.clients for point in asking.clients()] == [1, 2, 4, 8, 16, 32, 64]
    last = asking.methods()[-1].requests[0].path
    assert last.startswith("/v1/explain?methods=gradcam,layercam,hirescam,xgradcam")
    assert [point.label for point in asking.methods()] == ["1", "2", "3", "4", "5"]
    assert asking.targets()[-1].requests[0].path.count("top") == 10
    assert [p.requests[0].path.count("block") for p in asking.layers()] == [1, 2, 5, 10, 20]
    assert [p.label for p in asking.depth()] == [
        "block0",
        "block7",
        "block14",
        "block22",
        "block29",
    ]
