"""A service with real HTTP processes that was started with a configuration file."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from fake_engine import image_of
from running import Service, report
from traffic import Traffic, png

from service.settings import Settings
from tests.waiting import answers, until

FAKE = {"name": "fake", "source": "python:fake.fast"}
BASE: dict[str, Any] = {
    "server": {"port": 0, "devices": ["cpu"], "http_workers": 2, "grace_s": 5},
    "workers": {"canary_s": 0.3},
    "security": {"api_keys": ["one"], "admin_keys": ["admin"]},
    "models": [FAKE],
}


def toml(values: dict[str, Any]) -> str:
    """The configuration as TOML; its values are written as in JSON."""
    lines = [f"{key} = {json.dumps(v)}" for key, v in values.items() if isinstance(v, str)]
    for name, section in values.items():
        if isinstance(section, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in section.items())]
    for model in values["models"]:
        lines += ["[[models]]", *(f"{key} = {json.dumps(v)}" for key, v in model.items())]
    return "\n".join(lines)


class Configured:
    """A service with real HTTP processes and the file that it was started with."""

    def __init__(self, folder: Path, *flags: str, wait: bool = True, **values: Any) -> None:
        self.file = folder / "heatlens.toml"
        self.write(**values)
        self.service = Service(Settings(), folder, "real-http", f"config={self.file}", *flags)
        if wait:
            until(self.is_ready, timeout_s=60, every_s=0.02)

    def write(self, **values: Any) -> None:
        self.file.write_text(toml({**BASE, **values}))

    def is_ready(self) -> bool:
        return answers(self.service.url("/readyz"))

    def reload(self, *, until_log: str = "the configuration is reloaded", **values: Any) -> None:
        self.write(**values)
        self.hangup(until_log)

    def hangup(self, until_log: str) -> None:
        before = self.service.log.count(until_log)
        self.service.process.send_signal(signal.SIGHUP)
        took = until(lambda: self.service.log.count(until_log) > before, timeout_s=60)
        report(f"{until_log} after {took:.2f} s")

    def ask(
        self, *, key: str = "one", model: str = "", images: int = 1, content: bytes | None = None
    ) -> httpx.Response:
        files = [("image", png(image_of(n))) for n in range(images)]
        return httpx.post(
            self.service.url("/v1/predict" + (f"?model={model}" if model else "")),
            **({"files": files} if content is None else {"content": content}),
            headers={"X-API-Key": key},
            timeout=30,
            trust_env=False,
        )

    def logs(self, message: str) -> list[dict[str, Any]]:
        """The log lines with that message."""
        lines = map(json.loads, self.service.log.splitlines())
        return [line for line in lines if line["message"] == message]

    def http_pids(self) -> set[int]:
        return set(self.service.pids("service.api.process"))

    def traffic(self, **rest: Any) -> Traffic:
        return Traffic(
            self.service.url("/v1/predict"),
            lambda number, i: png(image_of(1000 * number + i)),
            headers={"X-API-Key": "one"},
            **rest,
        )


@contextlib.contextmanager
def configured_services() -> Iterator[Callable[..., Configured]]:
    """Starts services, and stops them in the end."""
    # The paths of pytest's own folders are too long for sockets.
    folder = Path(tempfile.mkdtemp(prefix="hl-", dir="/tmp"))
    started: list[Configured] = []

    def start(*flags: str, **values: Any) -> Configured:
        started.append(Configured(folder, *flags, **values))
        return started[-1]

    try:
        yield start
    finally:
        for item in started:
            item.service.stop()
        shutil.rmtree(folder)
