"""Starting, watching and ending server processes."""

from __future__ import annotations

import json
import os
import sys
import time

import psutil
import pytest

from benchmarks.servers import Server, ServerFailed, free_port, heatlens, model_entry

PROGRAM = """
import http.server, signal, subprocess, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"missing": ["device"]}' if Handler.asked < 10 else b'{"missing": []}')
    def log_message(self, *arguments):
        pass

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server_of(*arguments: str) -> Server:
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, str(port), *arguments]
    return Server("small", command, port=port, ready_path="/")


def test_ready_when_nothing_is_missing_and_nothing_outlives_it() -> None:
    with server_of() as server:
        assert server.wait_ready(timeout_s=20) >= 0.9  # it was asked ten times
        processes = server.processes()
        usage = server.usage()
        assert len(processes) == 2
        assert usage.total_cpu_s > 0
        assert 5 < usage.largest_mb["other"] <= usage.rss_mb
        assert server.url("/x") == f"http://127.0.0.1:{server.port}/x"
    until = time.monotonic() + 5
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() < until


def test_a_server_that_will_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.servers._STOP_S", 0.2)
    with server_of("stubborn") as server:
        server.wait_ready(timeout_s=20)
        assert server.stop() == -9


def test_a_server_that_fails_says_why() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    server = Server("broken", command, port=free_port(), ready_path="/")
    with server, pytest.raises(ServerFailed, match="no such model"):
        server.wait_ready(timeout_s=20)


def test_the_service_is_started_as_configured() -> None:
    server = heatlens(
        models=[model_entry("resnet50", precision="bf16")],
        server={"devices": "cpu"},
        settings={"LIMITS__MAX_WAIT_S": "1"},
    )
    assert server._command[1:4] == ["-m", "service", "serve"]
    assert server._command[-2:] == ["--devices", "cpu"]
    assert server._env["HEATLENS_LIMITS__MAX_WAIT_S"] == "1"
    assert server._env["PATH"] == os.environ["PATH"]
    (entry,) = json.loads(server._env["HEATLENS_MODELS"])
    assert entry == {
        "name": "resnet50",
        "source": "torchvision:resnet50",
        "weights": "none",
        "precision": "bf16",
        "runtime": "auto",
    }


def test_entries_are_valid() -> None:
    from models.catalog import ModelSpec

    for name in ("efficientnet_lite0", "resnet50", "timm:resnet18"):
        assert ModelSpec.model_validate(model_entry(name)).precision == "fp32"
