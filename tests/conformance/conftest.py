"""One service with the real engine, and what its native API says of one image.

These tests run in an environment of their own (`make test-clients`), which has the official clients
and not Heatlens: the service is a process of the interpreter that `HEATLENS_PYTHON` names, or runs
already at `HEATLENS_SERVICE` (host:port of HTTP and of gRPC, comma-separated; admin key `root`).
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from expected import Native, Service

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    httpx = pytest.importorskip("httpx")
    if running := os.environ.get("HEATLENS_SERVICE"):
        yield Service(*running.split(","))
        return
    python = os.environ.get("HEATLENS_PYTHON")
    if python is None:
        pytest.skip("HEATLENS_PYTHON does not name the interpreter that has Heatlens")
    ports = free_port(), free_port()
    folder = tmp_path_factory.mktemp("service")
    config, log = folder / "heatlens.toml", folder / "log"
    config.write_text(
        f'[server]\nport = {ports[0]}\ngrpc_port = {ports[1]}\ndevices = ["cpu"]\n'
        '[security]\nadmin_keys = ["root"]\n'
    )
    with log.open("w") as file:
        process = subprocess.Popen(
            [python, "-m", "service", "serve", "--config", str(config)],
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )
    found = Service(*(f"127.0.0.1:{port}" for port in ports))
    try:
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{found.url}/readyz", trust_env=False).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def png() -> bytes:
    """A drawn picture with something to see in it."""
    image_module = pytest.importorskip("PIL.Image")
    drawn = image_module.radial_gradient("L").resize((320, 240)).convert("RGB")
    drawn.paste((200, 60, 40), (60, 40, 160, 180))
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def b64(png: bytes) -> str:
    return base64.b64encode(png).decode()


@pytest.fixture(scope="session")
def native(service: Service, b64: str) -> Native:
    import httpx

    options = {"outputs": ["heatmap", "overlay", "values"], "top_k": 5}
    response = httpx.post(
        f"{service.url}/v1/explain",
        json={"images": [{"b64": b64}], **options},
        timeout=60,
        trust_env=False,
    )
    result = response.json()["results"][0]
    (explanation,) = result["explanations"]
    values = explanation["values"]
    return Native(
        result=result,
        predictions={p["class_id"]: (p["score"], p["probability"]) for p in result["predictions"]},
        labels=[p["label"] for p in result["predictions"]],
        heatmap=base64.b64decode(values["data"]),
        shape=tuple(values["shape"]),
        overlay=base64.b64decode(explanation["overlay"]["data"]),
    )
