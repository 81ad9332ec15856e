"""Heatlens on Ray Serve beside the plain service: answers a second, and what one costs.

python -m benchmarks.ray_serve [--clients 8] [--seconds 6] [--rounds 2] [--config heatlens.toml]

Each is asked in turn within a round; the others are idle meanwhile. Every answer is compared with
the plain service's. core-ms is the processor time of all processes of a server for one answer,
which hardly depends on what else the machine does. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np

from benchmarks.fleet import PICTURES, START_S, Traffic, explain, values
from benchmarks.servers import ROOT, Server, free_port

_APPLICATION = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: heatlens
    import_path: app:app
    route_prefix: /
    args: {{config: {config}, cpus: 1, min_replicas: {replicas}, max_replicas: {replicas}}}
"""


def main() -> None:
    """Read the arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--config", type=Path, help="of every service")
    parsed = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hl", dir="/tmp")))
        servers = {
            "plain, two device workers": plain(parsed.config, devices="cpu:0,cpu:1"),
            "Ray Serve, one replica": cluster(folder / "1", config=parsed.config, replicas=1),
            "Ray Serve, two replicas": cluster(folder / "2", config=parsed.config, replicas=2),
        }
        for server in servers.values():
            stack.enter_context(server).wait_ready(timeout_s=START_S)
        expected = answers_of(next(iter(servers.values())))
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for _ in range(parsed.rounds):
            for name, server in servers.items():
                found = _measure(server, expected, clients=parsed.clients, seconds=parsed.seconds)
                measured[name].append(found)
    for name, pairs in measured.items():
        rates, costs = zip(*pairs, strict=True)
        bases = [rate for rate, _ in next(iter(measured.values()))]
        ratio = statistics.median(rate / base for rate, base in zip(rates, bases, strict=True))
        row = f"{statistics.median(rates):6.1f}/s {ratio:5.2f}x {statistics.median(costs):6.1f} core-ms"
        sys.stdout.write(f"{name:26} {row}\n")


def plain(config: Path | None, *, devices: str) -> Server:
    """The service as it is."""
    port = free_port()
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--devices", devices]
    flags = ["--config", str(config.absolute())] if config else []
    return Server("plain", [*command, *flags], port=port, ready_path="/readyz")


def cluster(folder: Path, *, config: Path | None, replicas: int) -> Server:
    """A Ray cluster of its own that runs `deploy/ray_serve`; `folder` needs a short path."""
    folder.mkdir()
    port = free_port()
    file = folder / "application.yaml"
    path = config.absolute() if config else "null"
    file.write_text(_APPLICATION.format(port=port, config=path, replicas=replicas))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    env = {
        "PYTHONPATH": str(ROOT / "deploy/ray_serve"),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return Server("ray", command, port=port, ready_path="/readyz", env=env)


def answers_of(server: Server) -> list[np.ndarray]:
    """The map of each picture, asked for alone."""
    with httpx.Client(trust_env=False, timeout=60) as client:
        return [values(explain(client, server.url(), number)) for number in range(PICTURES)]


def _measure(
    server: Server, expected: Sequence[np.ndarray], *, clients: int, seconds: float
) -> tuple[float, float]:
    """Answers a second, and core-milliseconds for each."""
    begun, used = time.monotonic(), server.usage().total_cpu_s
    with Traffic(server.url(), expected).running(clients) as traffic:
        time.sleep(seconds)
    count = traffic.answers[200]
    if traffic.failed:
        raise RuntimeError(f"{server.name}: {traffic.answers}, {traffic.wrong}, {traffic.errors}")
    cost = (server.usage().total_cpu_s - used) / count * 1000
    return count / (time.monotonic() - begun), cost


if __name__ == "__main__":
    main()
