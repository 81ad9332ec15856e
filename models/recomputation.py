"""Gradient checkpointing of the reentrant kind, which gives no gradients of single tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import CheckpointFunction


@contextmanager
def run_straight() -> Iterator[list[str]]:
    """Run what is checkpointed as it is: there is nothing to save in a pass that trains nothing.

    Yields:
        The names of what was checkpointed in the pass, as they are met.
    """
    met: list[str] = []

    def straight(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        met.append(getattr(function, "__name__", type(function).__name__))
        return function(*args)

    checkpointed = CheckpointFunction.apply
    CheckpointFunction.apply = straight  # type: ignore[method-assign]
    try:
        yield met
    finally:
        CheckpointFunction.apply = checkpointed  # type: ignore[method-assign]
