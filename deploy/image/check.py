"""Runs the image `heatlens` as a cluster would, and looks at what it does: `make image-test`.

The container has a read-only root, no capabilities and the arguments that KServe appends; it is
asked for an explanation, and told to stop while it works on another one.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from PIL import Image

NAME = f"heatlens-check-{os.getpid()}"
# runc and cgroupfs also work where there is no systemd. The limits must not be above this shell's.
RUN = ("podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "run")
SANDBOX = (
    "--detach", "--name", NAME, "--network", "host", "--no-healthcheck",
    "--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096",
    "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp:mode=1777,size=64m",
    "--cap-drop", "all", "--security-opt", "no-new-privileges",
    "--env", "HEATLENS_SERVER__HOST=127.0.0.1",
)  # fmt: skip
START_S = 180.0
UID = "10001"


def main() -> int:
    """Run every check; returns the exit code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    kserve = ("--model_name", "cats", "--predictor_host", "none", "--http_port", str(port))
    podman(*RUN[1:], *SANDBOX, "localhost/heatlens", *kserve)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            check(client)
    except BaseException:
        sys.stderr.write(podman("logs", NAME))
        raise
    finally:
        podman("rm", "--force", "--time", "5", NAME)
    return 0


def check(client: httpx.Client) -> None:
    """Check the running container, which has stopped afterwards."""
    begun = time.monotonic()
    while not is_ready(client):
        assert time.monotonic() - begun < START_S, "/readyz does not answer 200"
        time.sleep(0.2)
    say(f"/readyz answers 200 after {time.monotonic() - begun:.1f} s")
    assert client.get("/v1/models/cats").json()["ready"], "--model_name"

    explained = client.post("/v1/explain", content=picture())
    assert explained.status_code == 200, explained.text
    (result,) = explained.json()["results"]
    label = result["predictions"][0]["label"]
    assert result["explanations"][0]["heatmap"]["data"]
    say(f"/v1/explain answers with a heatmap for {label!r}")

    pid = podman("inspect", "--format", "{{.State.Pid}}", NAME).strip()
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert set(status["Uid"].split()) == {UID}, status["Uid"]
    assert int(status["CapBnd"], 16) == 0, status["CapBnd"]
    assert status["NoNewPrivs"] == "1"
    say(f"runs as user {UID} without any capability")

    written = podman("exec", "--user", "0", NAME, "touch", "/opt/heatlens/x", "/x", succeeds=False)
    assert written.count("Read-only file system") == 2, written
    say("not even root can write to its root file system")

    found = podman("exec", NAME, "find", "/opt/heatlens", "-name", "libcud*")
    say(f"libraries of CUDA in it: {found.split() or 'none'}")

    with ThreadPoolExecutor(1) as threads:
        options = {"methods": "rise", "samples": 300}
        answer = threads.submit(client.post, "/v1/explain", content=picture(), params=options)
        # The scrape itself is the second one.
        while "heatlens_inflight 2" not in metrics(client):
            assert not answer.done(), answer.result().text
            time.sleep(0.05)
        podman("kill", "--signal", "TERM", NAME)
        assert answer.result().status_code == 200, answer.result().text
    assert podman("wait", NAME).strip() == "0"
    say("SIGTERM: what was accepted was answered, exit code 0")


def is_ready(client: httpx.Client) -> bool:
    """Whether the service says so."""
    with contextlib.suppress(httpx.TransportError):
        return client.get("/readyz").status_code == 200
    return False


def metrics(client: httpx.Client) -> str:
    """A scrape by a connection of its own."""
    return httpx.get(client.base_url.join("/metrics")).text.replace(".0\n", "\n")


def picture() -> bytes:
    """A drawn picture as PNG."""
    body = io.BytesIO()
    Image.linear_gradient("L").resize((320, 240)).convert("RGB").save(body, "PNG")
    return body.getvalue()


def podman(*arguments: str, succeeds: bool = True) -> str:
    """Run podman; returns what it printed.

    Raises:
        RuntimeError: it failed, or did not although it should.
    """
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    if (done.returncode == 0) != succeeds:
        raise RuntimeError(f"podman {' '.join(arguments)}: {done.stderr or done.stdout}")
    return done.stdout + ("" if succeeds else done.stderr)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
