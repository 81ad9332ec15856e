"""mosec: raw bytes in, dynamic batches of at most 16 with 5 ms of patience.

python -m benchmarks.peers.mosec_server WORKERS --port PORT --address 127.0.0.1 --timeout 60000
"""

from __future__ import annotations

import sys
from typing import Any

from mosec import Server, Worker

from benchmarks.peers.explainers import MAX_BATCH, Prepared, chosen


class Explain(Worker):
    """One stage; mosec calls `deserialize` and `serialize` for each request and `forward` for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self._explainer = chosen()

    def deserialize(self, data: bytes) -> Prepared:
        """From the body to what the model wants."""
        return self._explainer.prepare(data)

    def forward(self, data: list[Prepared]) -> list[dict[str, Any]]:
        """Explain a batch and draw its pictures."""
        explained = self._explainer.explain(data)
        return [self._explainer.answer(p, e) for p, e in zip(data, explained, strict=True)]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Explain,
        num=int(sys.argv[1]),
        max_batch_size=MAX_BATCH,
        max_wait_time=5,
        timeout=60,
        route="/explain",
    )
    server.run()
