"""The stream of events over real connections: directly, through curl and through nginx."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from configured import Configured, configured_services
from fake_engine import Fault, image_of
from traffic import png

from tests.waiting import until

pytestmark = [pytest.mark.process, pytest.mark.slow]

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
HEADERS = {"Accept": "text/event-stream", "X-API-Key": "one"}
QUERY = "methods=rise&outputs=heatmap&statistics=false"
SERVER = {"port": 0, "devices": ["cpu"], "http_workers": 1, "grace_s": 5}


@pytest.fixture(scope="module")
def running() -> Iterator[Configured]:
    """One service for all tests; each sends an image of its own."""
    with configured_services() as start:
        yield start(server=SERVER)


class Stream:
    """The events of one request as they come, with their times."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.events: list[tuple[float, str, Any]] = []

    def next(self) -> tuple[str, Any]:
        """The next event."""
        name = ""
        for line in self._lines:
            field, _, value = line.rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                self.events.append((time.monotonic(), name, json.loads(value)))
                return name, self.events[-1][2]
        raise AssertionError("the stream has ended")

    def to_end(self) -> tuple[str, Any]:
        """The event that is not progress, after all progress."""
        while (event := self.next())[0] == "progress":
            pass
        return event

    @property
    def progress(self) -> list[tuple[float, dict[str, Any]]]:
        return [(at, data) for at, name, data in self.events if name == "progress"]

    def longest_silence(self) -> float:
        return max(later - at for (at, *_), (later, *_) in pairwise(self.events))


@contextlib.contextmanager
def streaming(url: str, *, steps: int, image: int = 1) -> Iterator[Stream]:
    """Stream the explanation of an image that takes so many steps of 10 ms."""
    body = png(image_of(image, Fault.LONG, steps))
    with (
        httpx.Client(trust_env=False, timeout=30) as client,
        client.stream("POST", f"{url}?{QUERY}", content=body, headers=HEADERS) as response,
    ):
        assert response.status_code == 200
        yield Stream(response.iter_lines())


def test_progress_comes_every_second_and_says_how_long_it_takes(running):
    with streaming(running.service.url("/v1/explain"), steps=240) as stream:
        name, result = stream.to_end()
    assert (name, len(result["results"])) == ("result", 1)
    assert stream.longest_silence() < 1.0
    ended, *_ = stream.events[-1]
    assert [data["total"] for _, data in stream.progress] == [240] * len(stream.progress)
    done = [data["done"] for _, data in stream.progress]
    assert done == sorted(done)
    for at, data in stream.progress[1:]:
        # Half a second of a job of three is more than 30 % in its end.
        assert data["seconds_left"] == pytest.approx(ended - at, rel=0.3, abs=0.3)


def test_a_closed_stream_frees_the_device_within_a_step(running):
    with streaming(running.service.url("/v1/explain"), steps=255) as stream:
        assert stream.next()[0] == "progress"
        assert running.service.status().queue_depth == 1
    until(lambda: running.service.status().queue_depth == 0, timeout_s=1.0)
    steps = len(running.service.journal())
    assert running.ask().status_code == 200
    # The request alone has run since, and canary passes, which are no part of a journal's steps.
    later = running.service.journal()[steps:]
    assert not any(word.startswith("step:") for line in later for word in line)
    *_, line = (line for line in running.logs("request") if line["path"] == "/v1/explain")
    assert (line["status"], line["code"]) == (499, "cancelled")


def test_a_worker_that_dies_again_and_again_ends_the_stream_with_an_error(running):
    with streaming(running.service.url("/v1/explain"), steps=255, image=2) as stream:
        name, data = stream.next()
        killed = set()
        while name == "progress":
            pid = running.service.worker_pid()
            if data["what"] == "rise" and pid and pid not in killed:
                # The image waits for the next worker, and begins again there.
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            name, data = stream.next()
    assert (name, data["code"]) == ("error", "input_quarantined")
    assert len(killed) > 1


def test_a_deadline_ends_the_stream_with_an_error(running):
    url = running.service.url("/v1/explain")
    body = png(image_of(1, Fault.LONG, 255))
    with httpx.stream(
        "POST",
        f"{url}?{QUERY}&samples=100&timeout_s=1",
        content=body,
        headers=HEADERS,
        trust_env=False,
    ) as response:
        name, error = Stream(response.iter_lines()).to_end()
    assert (name, error["code"]) == ("error", "deadline_exceeded")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_prints_events_as_they_come(running, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(png(image_of(1, Fault.LONG, 150)))
    headers = [part for name, value in HEADERS.items() for part in ("-H", f"{name}: {value}")]
    url = running.service.url(f"/v1/explain?{QUERY}")
    command = ["curl", "-sN", "--noproxy", "*", "-F", f"image=@{image}", *headers, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        stream = Stream(iter(curl.stdout))
        assert stream.to_end()[0] == "result"
    assert curl.returncode == 0
    assert len(stream.progress) >= 2
    assert stream.events[-1][0] - stream.events[0][0] > 0.5, "it came all at once"


@pytest.fixture
def proxy(running, tmp_path) -> Iterator[str]:
    """The URL of an nginx in front of the service, with default settings."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    places = "".join(
        f"{name}_temp_path {tmp_path / name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(f"""
        pid {tmp_path}/nginx.pid;
        daemon off;
        events {{}}
        http {{
            access_log off;
            {places}
            server {{
                listen 127.0.0.1:{port};
                location / {{ proxy_pass {running.service.url("")}; }}
            }}
        }}
    """)
    command = [NGINX, "-p", str(tmp_path), "-e", str(tmp_path / "error.log"), "-c", str(config)]
    nginx = subprocess.Popen(command)
    try:
        until(lambda: nginx.poll() is not None or _accepts(port))
        assert nginx.poll() is None, (tmp_path / "error.log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        nginx.terminate()
        nginx.wait(10)


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_events_pass_through_nginx_as_they_come(proxy, running):
    with streaming(f"{proxy}/v1/explain", steps=200) as stream:
        assert stream.to_end()[0] == "result"
    assert stream.longest_silence() < 1.0
    assert len(stream.progress) >= 3
    with streaming(f"{proxy}/v1/explain", steps=255) as stream:
        stream.next()
        until(lambda: running.service.status().queue_depth == 1)
    until(lambda: running.service.status().queue_depth == 0, timeout_s=1.0)
