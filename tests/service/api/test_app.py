"""The application in its process: its imports, its memory, its behaviour behind a real server."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import Depends, FastAPI

from service.api.app import create_app
from service.api.security import require_admin_key
from service.settings import Settings
from tests.fakes import FakePool
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[3]
MAX_RESIDENT_MB = 120


def run(program: str, **env: str) -> str:
    """Run a program in a fresh interpreter; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_http_process_is_light() -> None:
    """No torch, and after a request of every kind still little memory."""
    program = """
import asyncio, io, sys
import psutil
import service.api.app
heavy = {"torch", "torchvision", "timm", "scipy", "matplotlib", "httpx", "typer", "rich"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from PIL import Image
from service.settings import Settings
from tests.fakes import FakePool

def scope(path):
    return {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}

async def post(app, path, body):
    messages, sent, never = [{"type": "http.request", "body": body}], [], asyncio.Event()
    async def receive():
        if messages:
            return messages.pop()
        await never.wait()
    async def send(message):
        sent.append(message)
    await app(scope(path), receive, send)
    assert sent[0]["status"] == 200, sent

async def main():
    image = io.BytesIO()
    Image.effect_noise((500, 375), 60).save(image, "JPEG")
    app = service.api.app.create_app(Settings(), FakePool())
    async with app.router.lifespan_context(app):
        for path in ("/v1/predict", "/v1/explain", "/v1/features"):
            await post(app, path, image.getvalue())

asyncio.run(main())
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print(psutil.Process().memory_info().rss / 1e6)
"""
    assert float(run(program)) <= MAX_RESIDENT_MB


def test_metrics_of_several_processes_are_added(tmp_path: Path) -> None:
    """With the folder that the supervisor sets, any process reports what all of them counted."""
    count = """
from service.api.metrics import Metrics
from tests.fakes import FakePool
metrics = Metrics(FakePool())
metrics.rejected.labels("overloaded").inc()
metrics.request_seconds.labels("GET", "/v1/models", "200").observe(0.1)
print(metrics.exposition().decode())
"""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    run(count, **env)
    text = run(count, **env)
    assert 'heatlens_rejected_total{reason="overloaded"} 2.0' in text
    assert 'status="200"} 2.0' in text
    assert text.count('heatlens_device_up{device="cpu"} 1.0') == 1


def test_applications_share_no_state() -> None:
    first, second = (create_app(Settings(), FakePool()) for _ in range(2))
    assert first.state is not second.state
    assert first.openapi() == second.openapi()


@pytest.mark.anyio
async def test_the_lifespan_starts_and_closes_the_pool() -> None:
    class Watched(FakePool):
        events: list[str]

        async def start(self) -> None:
            self.events = ["start"]

        async def close(self) -> None:
            self.events.append("close")

    pool = Watched()
    app = create_app(Settings(), pool)
    for _ in range(2):  # it may be entered again
        async with app.router.lifespan_context(app):
            assert pool.events == ["start"]
        assert pool.events == ["start", "close"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("admin_keys", "key", "status", "code"),
    [
        ([], "root", 403, "admin_disabled"),
        ([], None, 403, "admin_disabled"),
        (["root"], None, 401, "unauthorized"),
        (["root"], "nope", 401, "unauthorized"),
        (["root"], "open", 403, "forbidden"),
        (["root"], "root", 200, None),
    ],
)
async def test_admin_keys(
    admin_keys: list[str], key: str | None, status: int, code: str | None
) -> None:
    settings = Settings(security={"api_keys": ["open"], "admin_keys": admin_keys})
    app: FastAPI = create_app(settings, FakePool())

    @app.post("/admin", dependencies=[Depends(require_admin_key)])
    async def administer() -> dict[str, str]:
        return {}

    headers = {"X-API-Key": key} if key else {}
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t") as client,
    ):
        response = await client.post("/admin", headers=headers)
    assert (response.status_code, response.json().get("code")) == (status, code)


# ---------------------------------------------------------------- behind uvicorn


@asynccontextmanager
async def serving(settings: Settings, pool: FakePool) -> AsyncIterator[tuple[str, int]]:
    """A real server on the loopback."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(settings, pool), log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listening]))
    await eventually(lambda: server.started)
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        await running
        listening.close()


@pytest.mark.anyio
async def test_a_body_too_large_is_answered_while_it_is_still_being_sent() -> None:
    settings = Settings(limits={"max_body_mb": 0.1})
    async with serving(settings, FakePool()) as (host, port), httpx.AsyncClient() as client:
        for content in (bytes(5_000_000), stream(500)):
            response = await client.post(f"http://{host}:{port}/v1/predict", content=content)
            assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


async def stream(chunks: int) -> AsyncIterator[bytes]:
    for _ in range(chunks):
        yield bytes(10_000)


@pytest.mark.anyio
async def test_closing_the_connection_cancels_the_job() -> None:
    pool = FakePool(delay_s=30)
    image = b"BM" + (70).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    image += (40).to_bytes(4, "little") + (2).to_bytes(4, "little") * 2
    image += (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24) + bytes(16)
    async with serving(Settings(), pool) as (host, port):
        _, writer = await asyncio.open_connection(host, port)
        head = f"POST /v1/predict HTTP/1.1\r\nHost: t\r\nContent-Length: {len(image)}\r\n\r\n"
        writer.write(head.encode() + image)
        await asyncio.wait_for(pool.arrived.wait(), 10)
        writer.close()
        await writer.wait_closed()
        await eventually(lambda: pool.cancelled)
    assert pool.cancelled == [pool.submitted[0].id]
