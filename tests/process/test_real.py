"""The service as it is shipped: real application, real engine, real default model, one crash."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import skimage.data
from PIL import Image
from running import report

from tests.waiting import answers, until

pytestmark = [pytest.mark.process, pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]

CATS = {"tabby", "tiger cat", "Egyptian cat", "lynx"}


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def serving(tmp_path):
    port = free_port()
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", "--port", str(port), "--devices", "cpu"],
        stderr=log,
        stdout=log,
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=130) as client:
        yield process, client
    process.terminate()
    try:
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        log.close()


def descendants(process: subprocess.Popen[bytes], *texts: str) -> list[psutil.Process]:
    """The processes of a service with these texts in their name or command line."""
    processes = psutil.Process(process.pid).children(recursive=True)
    # A fork has the command line of its server.
    names = {
        p: p.name() if p.name().startswith("worker ") else " ".join(p.cmdline()) for p in processes
    }
    return [next(p for p, name in names.items() if text in name) for text in texts]


def test_a_cat_is_explained_before_and_after_crashes(serving):
    process, client = serving
    ready = f"http://127.0.0.1:{client.base_url.port}/readyz"
    took_s = until(lambda: answers(ready), timeout_s=100, every_s=0.1)
    report(f"ready after {took_s:.1f} s")
    body = io.BytesIO()
    Image.fromarray(skimage.data.chelsea()).save(body, "JPEG")

    def explain() -> httpx.Response:
        files = {"image": ("cat.jpg", body.getvalue(), "image/jpeg")}
        return client.post("/v1/explain", files=files, params={"timeout_s": 120})

    first = explain()
    assert first.status_code == 200, first.text
    found = first.json()["results"][0]
    assert found["predictions"][0]["label"] in CATS
    worker, server, http = descendants(process, "worker cpu", "fork_server", "api.process")
    assert server.num_threads() == 1, "a fork has one thread of its server's, and locks of all"
    report(f"HTTP process: {http.memory_info().rss / 1e6:.0f} MB resident")
    assert http.memory_info().rss < 120e6
    for victim in (worker, server):
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda: not answers(ready), timeout_s=1.5)
        begun = time.monotonic()
        second = explain()
        report(f"answered {time.monotonic() - begun:.1f} s after the crash")
        assert second.status_code == 200, second.text
        again = second.json()["results"][0]["predictions"][0]
        assert again["probability"] == pytest.approx(
            found["predictions"][0]["probability"], rel=1e-4
        )
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not any(child.is_running() for child in children)
