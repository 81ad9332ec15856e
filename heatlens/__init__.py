"""Heatlens for Python: classify images and see why, through a service or in this process.

    from heatlens import Client

    with Client("http://127.0.0.1:8000") as client:
        response = client.explain("cat.jpg", methods=["gradcam"])
    response.explanation.overlay.save("why.png")

`AsyncClient` is the same with `await`; `load` explains in this process, without a service. Names are
imported when they are first used: `import heatlens` alone takes a few milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heatlens.client import AsyncClient, Client
    from heatlens.errors import APIError, ConnectionFailed, HeatlensError, LoadFailed, TimedOut
    from heatlens.local import LocalModel, load
    from heatlens.results import (
        CompareResponse,
        ExplainResponse,
        Explanation,
        FeaturesResponse,
        ModelCard,
        PartialMap,
        Prediction,
        PredictResponse,
        Progress,
        Statistics,
    )

_NAMES = {
    "client": ("AsyncClient", "Client"),
    "errors": ("APIError", "ConnectionFailed", "HeatlensError", "LoadFailed", "TimedOut"),
    "local": ("LocalModel", "load"),
    "results": (
        *("CompareResponse", "ExplainResponse", "Explanation", "FeaturesResponse", "ModelCard"),
        *("PartialMap", "PredictResponse", "Prediction", "Progress", "Statistics"),
    ),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "APIError",
    "AsyncClient",
    "Client",
    "CompareResponse",
    "ConnectionFailed",
    "ExplainResponse",
    "Explanation",
    "FeaturesResponse",
    "HeatlensError",
    "LoadFailed",
    "LocalModel",
    "ModelCard",
    "PartialMap",
    "PredictResponse",
    "Prediction",
    "Progress",
    "Statistics",
    "TimedOut",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("heatlens")
    if name not in _MODULES:
        raise AttributeError(f"module 'heatlens' has no attribute {name!r}")
    value = getattr(import_module(f"heatlens.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})
