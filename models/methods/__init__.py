"""Every explanation method: described by METHODS without torch, computed by one function.

The function is in the module that the method's family names. The API's enum, `/v1/methods`, the
docs and the property tests are made from the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from models.methods.table import METHODS

__all__ = ["METHODS", "implementation", "weights_implementation"]


def implementation(name: str) -> Callable[..., Any]:
    """The function that computes a method; this is where torch is imported."""
    function: Callable[..., Any] = getattr(_module(name), name)
    return function


def weights_implementation(name: str) -> Callable[..., Any] | None:
    """The function that computes a method's channel weights, where the method defines them."""
    return getattr(_module(name), f"{name}_weights", None)


def _module(name: str) -> Any:
    return importlib.import_module(f"models.methods.{METHODS[name].family}")
