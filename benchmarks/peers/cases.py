"""The cases of the comparison: which server, how it is started, and how it is asked."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.servers import Server, free_port, heatlens, model_entry
from service.cli.bench.requests import Request, image_requests

BOUNDARY = "benchmark-boundary"
OUTPUTS = {
    "heatmap": {"outputs": "heatmap", "statistics": "false", "top_k": "5"},
    "overlay PNG": {
        "outputs": "overlay",
        "overlay_format": "png",
        "statistics": "false",
        "top_k": "5",
    },
    "defaults": {},
}
"""What Heatlens is asked for: a heatmap to lay over the picture (palette PNG), the picture that the peers answer, and
what a request without options gets: heatmap, overlay and statistics."""

Asking = Callable[[Sequence[bytes]], list[Request]]


@dataclass(frozen=True)
class Case:
    """A server, and the ways in which it is asked.

    Attributes:
        name: row of the table.
        group: `documented`, `tuned`, or the precision of Heatlens.
        start: makes the server, not started yet.
        asked: by row; a peer has one.
    """

    name: str
    group: str
    start: Callable[[], Server]
    asked: dict[str, Asking]


def cases(model: str, precisions: Sequence[str], runtimes: Sequence[str] = ("auto",)) -> list[Case]:
    """All of them for one model."""
    found = [_heatlens(model, p, runtime) for p in precisions for runtime in runtimes]
    for tuned in (False, True):
        group = "tuned" if tuned else "documented"
        for framework, asking in (
            ("FastAPI", raw_body if tuned else multipart),
            ("LitServe", json_base64),
            ("mosec", raw_body),
        ):
            name = f"{framework} + {'torch-cam, tuned' if tuned else 'pytorch-grad-cam'}"
            found.append(
                Case(
                    name=name,
                    group=group,
                    start=lambda f=framework, t=tuned: peer_server(f, model, tuned=t),
                    asked={name: asking},
                )
            )
    return found


def _heatlens(model: str, precision: str, runtime: str) -> Case:
    def asking(options: dict[str, str]) -> Asking:
        return lambda images: image_requests(images, options=options)

    entry = model_entry(model, precision=precision, runtime=runtime)
    title = f"Heatlens {precision}" + ("" if runtime == "auto" else f" on {runtime}")
    return Case(
        name=title,
        group=precision,
        start=lambda: heatlens(models=[entry], settings={"LIMITS__MAX_WAIT_S": "60"}),
        asked={f"{title}, {name}": asking(o) for name, o in OUTPUTS.items()},
    )


def peer_server(framework: str, model: str, *, tuned: bool) -> Server:
    """A peer: as documented one worker with torch's own threads; tuned one worker of one thread for each of 2 cores.

    On two cores that is the better arrangement of each, measured.
    """
    workers = "2" if tuned else "1"
    port = str(free_port())
    module = f"benchmarks.peers.{framework.lower()}_server"
    if framework == "mosec":
        arguments = [workers, "--port", port, "--address", "127.0.0.1", "--timeout", "60000"]
        arguments += ["--log-level", "warning"]
    else:
        arguments = [port, workers]
    env = {"PEER_MODEL": model, "PEER_TUNED": "1" if tuned else "0"}
    if tuned:
        env |= {"OMP_NUM_THREADS": "1"}
    return Server(
        f"{framework} {'tuned' if tuned else 'documented'}",
        [sys.executable, "-m", module, *arguments],
        port=int(port),
        ready_path="/metrics" if framework == "mosec" else "/health",
        env=env,
    )


def raw_body(images: Sequence[bytes]) -> list[Request]:
    """The image is the body."""
    return _requests(images, content_type="image/jpeg")


def json_base64(images: Sequence[bytes]) -> list[Request]:
    """`{"image": "<base64>"}`."""
    bodies = [json.dumps({"image": base64.b64encode(data).decode()}).encode() for data in images]
    return _requests(bodies, content_type="application/json")


def multipart(images: Sequence[bytes]) -> list[Request]:
    """A form with one file."""
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    bodies = []
    for data in images:
        form = httpx.Request(
            "POST",
            "http://localhost",
            files={"image": ("picture.jpg", data, "image/jpeg")},
            headers={"Content-Type": content_type},
        )
        bodies.append(form.read())
    return _requests(bodies, content_type=content_type)


def _requests(bodies: Sequence[bytes], *, content_type: str) -> list[Request]:
    headers = {"Content-Type": content_type}
    return [
        Request(path="/explain", body=body, headers=headers, image=number)
        for number, body in enumerate(bodies)
    ]
