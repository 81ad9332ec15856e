"""What the tests share: where the service is, and what it is expected to say."""

from __future__ import annotations

from typing import Any, NamedTuple

MODEL = "efficientnet_lite0"
ADMIN = {"X-API-Key": "root"}


class Service(NamedTuple):
    """Where the service listens."""

    http: str
    grpc: str

    @property
    def url(self) -> str:
        return f"http://{self.http}"


class Native(NamedTuple):
    """What the native API says."""

    result: dict[str, Any]
    predictions: dict[int, tuple[float, float]]
    labels: list[str]
    heatmap: bytes
    shape: tuple[int, int]
    overlay: bytes
