"""The page in Chromium, served by the real application on the embedded model and a tiny second one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import uvicorn

from models.catalog import default_spec
from service.api.app import create_app
from service.settings import Settings
from service.worker.local import LocalPool

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
AXE = ROOT / ".venv" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
SAMPLES = ROOT / "service" / "web" / "samples"
WIDE, NARROW = (1280, 860), (390, 800)

TINY = """
from torch import nn

def net():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )
    return network, {"preprocess": {"crop": 64, "resize": 64}, "labels": ["ant", "bee", "cat"]}
"""


class Server:
    """An application with a pool of its own, served from a thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(250)

    async def _serve(self) -> None:
        pool = LocalPool(self._settings)
        app = create_app(self._settings, pool)
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        serving = asyncio.create_task(self._server.serve([listening]))
        await pool.wait_ready()
        self._ready.set()
        await serving

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)


@pytest.fixture(scope="session")
def playwright():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict:
    """Settings of a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "net_of_page.py").write_text(TINY)
    model = {"name": "tiny", "source": "python:net_of_page:net", "weights": "none"}
    return {"models": [model], "base_dir": folder}


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[str]:
    """The origin of the front end in `examples/`, served by another server."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=ROOT / "examples/front-end")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        thread = threading.Thread(target=files.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{files.server_port}"
        files.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def server(playwright, tiny, elsewhere) -> Iterator[Server]:
    settings = Settings(
        models=[default_spec().model_copy(update={"runtime": "torch"}), *tiny["models"]],
        base_dir=tiny["base_dir"],
        server={"devices": ["cpu"]},
        # A thread that waits for another one that is not run waits long on a busy machine.
        workers={"threads": 1},
        limits={"max_wait_s": 1000.0},
        security={"cors_origins": [elsewhere]},
    )
    server = Server(settings)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def browser(playwright):
    camera = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
    yield browser
    browser.close()


@pytest.fixture
def visit(browser, server) -> Iterator[Callable]:
    """Opens the page at a hash, width and colour scheme; at the end nothing may have gone wrong.

    `expected` are parts of console messages that the test provokes.
    """
    contexts: list = []
    problems: list[str] = []
    # Tests read canvases, the page does not.
    expected = ["Multiple readback operations"]

    def note(text: str) -> None:
        if not any(part in text for part in expected):
            problems.append(text)

    def visit(
        state: str = "",
        *,
        size=WIDE,
        scheme="light",
        at=None,
        expect: Sequence[str] = (),
        **context,
    ):
        expected.extend(expect)
        own = (at or server).url
        opened = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            reduced_motion="reduce",
            permissions=["clipboard-read", "clipboard-write", "camera"],
            **context,
        )
        contexts.append(opened)
        page = opened.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda m: m.type in ("error", "warning") and note(m.text))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("request", lambda r: r.url.startswith((own, "blob:", "data:")) or note(r.url))
        page.goto(f"{own}#{state}")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def drop() -> Callable:
    """Drops files on the page, as a person does from a folder."""

    def drop(page, *files: Path | tuple[str, bytes]) -> None:
        named = [f if isinstance(f, tuple) else (f.name, f.read_bytes()) for f in files]
        data = page.evaluate_handle(
            """files => {
              const data = new DataTransfer();
              for (const [name, bytes] of files)
                data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/jpeg'}));
              return data;
            }""",
            [[name, list(content)] for name, content in named],
        )
        page.dispatch_event("body", "dragenter", {"dataTransfer": data})
        page.dispatch_event("body", "drop", {"dataTransfer": data})

    return drop


@pytest.fixture(scope="session")
def other_server(playwright, tiny) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """Starts a service with other settings on the tiny model."""

    @contextlib.contextmanager
    def start(**sections) -> Iterator[Server]:
        server = Server(
            Settings(
                server={"devices": ["cpu"]},
                workers={"threads": 1},
                default_model="tiny",
                **tiny,
                **sections,
            )
        )
        try:
            yield server
        finally:
            server.stop()

    return start
