"""Steady requests over kept connections, every answer of which is kept too."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    """An image of the fake engine as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Traffic:
    """Clients, each in a thread of its own with a connection of its own, that ask again as soon as they are answered.

    Args:
        url: what they ask.
        content: what client `n` sends the `i`-th time.
        pause_s: between an answer and the next request.

    Attributes:
        answers: every answer.
        errors: what no answer came of: on this machine only a fault of the service's.
    """

    def __init__(
        self,
        url: str,
        content: Callable[[int, int], bytes],
        *,
        clients: int = 4,
        pause_s: float = 0.01,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._url, self._content = url, content
        self._pause_s, self._headers = pause_s, headers
        self._over = threading.Event()
        self.answers: list[httpx.Response] = []
        self.errors: list[Exception] = []
        self._local_ports: set[int] = set()
        self._threads = [
            threading.Thread(target=self._ask, args=(number,), daemon=True)
            for number in range(clients)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def after(self, count: int) -> None:
        """Wait until there are `count` answers more than now."""
        wanted = len(self.answers) + count
        until = time.monotonic() + 30
        while len(self.answers) < wanted:
            assert time.monotonic() < until, "nothing is answered any more"
            time.sleep(0.01)

    def _ask(self, number: int) -> None:
        with httpx.Client(trust_env=False, timeout=30, headers=self._headers) as client:
            i = 0
            while not self._over.is_set():
                try:
                    answer = client.post(self._url, content=self._content(number, i))
                except httpx.TransportError as error:
                    self.errors.append(error)
                else:
                    self.answers.append(answer)
                    stream = answer.extensions["network_stream"]
                    self._local_ports.add(stream.get_extra_info("client_addr")[1])
                i += 1
                time.sleep(self._pause_s)

    @property
    def connections(self) -> int:
        """How many connections were needed."""
        return len(self._local_ports)

    def statuses(self) -> set[int]:
        """Every status there was."""
        return {answer.status_code for answer in self.answers}
