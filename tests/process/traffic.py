"""Steady requests over kept-alive connections, with a record of all responses."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.waiting import until


def png(pixels: np.ndarray) -> bytes:
    """An image of the fake engine as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Traffic:
    """Clients that send their next request when the last one has ended, each in its own thread.

    Each has its own connection.

    Args:
        url: the URL to send to.
        content: the body of the `i`-th request of client `n`.
        pause_s: time between a response and the next request.

    Attributes:
        answers: every response.
        errors: failures without a response.
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
        """Wait for `count` further responses."""
        wanted = len(self.answers) + count
        until(lambda: len(self.answers) >= wanted, timeout_s=30)

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
                self._over.wait(self._pause_s)

    @property
    def connections(self) -> int:
        """The number of connections that were opened."""
        return len(self._local_ports)

    def statuses(self) -> set[int]:
        """The statuses of all responses."""
        return {answer.status_code for answer in self.answers}
