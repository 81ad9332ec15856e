"""LitServe: its five verbs, dynamic batches of at most 16 with 5 ms of patience, pictures as base64 in JSON.

python -m benchmarks.peers.litserve_server PORT WORKERS
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve as ls

from benchmarks.peers.explainers import MAX_BATCH, Explained, Prepared, chosen


class ExplainAPI(ls.LitAPI):
    """Decoding and drawing for each request, the model for each batch, as LitServe's guide on batching shows."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe names it
        """Load the model, once in each worker."""
        self.explainer = chosen()

    def decode_request(self, request) -> Prepared:  # noqa: ANN001 - an annotation is a schema here
        """From JSON to what the model wants."""
        return self.explainer.prepare(base64.b64decode(request["image"]))

    def predict(self, batch: list[Prepared]) -> list[tuple[Prepared, Explained]]:
        """Explain a batch."""
        return list(zip(batch, self.explainer.explain(batch), strict=True))

    def encode_response(self, output: tuple[Prepared, Explained]) -> dict[str, Any]:
        """Draw one picture."""
        return self.explainer.answer(*output)


if __name__ == "__main__":
    api = ExplainAPI(max_batch_size=MAX_BATCH, batch_timeout=0.005, api_path="/explain")
    server = ls.LitServer(
        api, accelerator="cpu", devices=1, workers_per_device=int(sys.argv[2]), timeout=60
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )
