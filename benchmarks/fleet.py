"""A fleet on this machine: two services behind nginx, one drained, restarted and killed under load.

python -m benchmarks.fleet [--clients 8] [--seconds 5] [--config heatlens.toml]

nginx runs `deploy/nginx/heatlens.conf` with other ports. Clients ask for explanations of drawn
pictures without a pause, and compare each answer with the one of an undisturbed service.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from benchmarks.servers import ROOT, Server, free_port

CONFIG = ROOT / "deploy/nginx/heatlens.conf"
PICTURES = 4

START_S = 300.0

_NGINX = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
worker_processes 1;
events {{ worker_connections 512; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/heatlens.conf;
    access_log {folder}/access.log heatlens;
}}
"""


@dataclass
class Traffic:
    """What clients got.

    Attributes:
        url: the service.
        expected: the map of each picture.
        answers: answers by status; 200 only with the map that was expected.
        wrong: answers with another map.
        errors: failures without an answer.
        tried_again: requests that nginx sent to a second instance.
    """

    url: str
    expected: Sequence[np.ndarray]
    answers: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    tried_again: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def failed(self) -> int:
        """Requests without the right answer."""
        return self.wrong + len(self.errors) + self.answers.total() - self.answers[200]

    @contextlib.contextmanager
    def running(self, clients: int) -> Iterator[Traffic]:
        """Send requests, each client its next one when it has the answer."""
        threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(trust_env=False, timeout=60) as client:
            while not self._over.is_set():
                number = (number + 1) % PICTURES
                try:
                    answer = explain(client, self.url, number)
                except httpx.TransportError as error:
                    self.errors.append(repr(error))
                    continue
                self.answers[answer.status_code] += 1
                if answer.status_code == 200:
                    self.wrong += not same(values(answer), self.expected[number])


def main() -> None:
    """Read the arguments, drive the fleet, print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="between two events")
    parser.add_argument("--config", type=Path, help="of both services")
    parsed = parser.parse_args()
    phases = drive(parsed.config, clients=parsed.clients, pause_s=parsed.seconds)
    sys.exit(1 if any(phase.failed for phase in phases) else 0)


def drive(config: Path | None, *, clients: int, pause_s: float) -> tuple[Traffic, Traffic]:
    """Drain and restart one of two services, then kill it; returns what clients got in each."""
    flags = ["--config", str(config)] if config else []
    ports = [free_port(), free_port()]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first, second = (stack.enter_context(_service(port, flags)) for port in ports)
        for service in (first, second):
            _say(f"{service.name} is ready after {service.wait_ready(timeout_s=START_S):.1f} s")
        with httpx.Client(trust_env=False, timeout=60) as client:
            expected = [values(explain(client, second.url(), n)) for n in range(PICTURES)]
        proxy = stack.enter_context(_nginx(folder, ports))
        proxy.wait_ready()

        with Traffic(proxy.url(), expected).running(clients) as drained:
            time.sleep(pause_s)
            _say(f"drained: exit code {first.stop()}")
            first = stack.enter_context(_service(ports[0], flags))
            _say(f"restarted: ready after {first.wait_ready(timeout_s=START_S):.1f} s")
            time.sleep(pause_s)
        drained.tried_again = _tried_again(folder)
        _report("drain and restart", drained)

        with Traffic(proxy.url(), expected).running(clients) as killed:
            time.sleep(pause_s)
            first.kill()
            time.sleep(pause_s)
        killed.tried_again = _tried_again(folder) - drained.tried_again
        _report("kill", killed)
    return drained, killed


def _service(port: int, flags: Sequence[str]) -> Server:
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--devices", "cpu"]
    return Server(f"service {port}", [*command, *flags], port=port, ready_path="/readyz")


def _nginx(folder: Path, ports: Sequence[int]) -> Server:
    """Start nginx with the configuration that users copy, on ports of its own."""
    listen = free_port()
    text = CONFIG.read_text().replace("listen 8000;", f"listen 127.0.0.1:{listen};")
    for written, port in zip(("8001", "8002"), ports, strict=True):
        text = text.replace(f"server 127.0.0.1:{written} ", f"server 127.0.0.1:{port} ")
    (folder / "heatlens.conf").write_text(text)
    (folder / "nginx.conf").write_text(_NGINX.format(folder=folder))
    command = [
        "nginx",
        "-p",
        str(folder),
        "-c",
        str(folder / "nginx.conf"),
        "-e",
        f"{folder}/error.log",
    ]
    return Server("nginx", command, port=listen, ready_path="/readyz")


def explain(client: httpx.Client, url: str, number: int) -> httpx.Response:
    """Ask for the values of the map of a drawn picture."""
    shade = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    body = io.BytesIO()
    Image.fromarray(shade).resize((256, 192)).save(body, "PNG")
    # A fixed target: ranks of nearly equal scores may swap between batches.
    options = {"outputs": "values", "targets": "1", "statistics": "false"}
    return client.post(f"{url}/v1/explain", content=body.getvalue(), params=options)


def values(answer: httpx.Response) -> np.ndarray:
    """The map of an answer."""
    (result,) = answer.raise_for_status().json()["results"]
    found = result["explanations"][0]["values"]
    return np.frombuffer(base64.b64decode(found["data"]), np.float32).reshape(found["shape"])


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two maps are equal but for rounding, which depends on the size of the batch."""
    return one.shape == other.shape and np.allclose(one, other, atol=1e-3 * np.abs(other).max())


def _tried_again(folder: Path) -> int:
    """Requests that nginx sent to a second instance, by its access log."""
    log = (folder / "access.log").read_text()
    return len(re.findall(r"127\.0\.0\.1:\d+, 127\.0\.0\.1:\d+ \d+, \d+$", log, re.MULTILINE))


def _report(event: str, traffic: Traffic) -> None:
    counts = f"wrong {traffic.wrong}, errors {traffic.errors}, tried again {traffic.tried_again}"
    _say(f"{event}: answers by status {dict(traffic.answers)}, {counts}")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
