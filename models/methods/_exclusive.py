"""A step of its own whose typed error ends this method, and not the batch that the step runs in."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TypeVar

from models.errors import HeatlensError
from models.steps import Unbatched, Step

T = TypeVar("T")


def run_unbatched(run: Callable[[], T], *, cost: int) -> Generator[Step, T | HeatlensError, T]:
    """Yield one `Unbatched` step and return what `run` returned.

    Args:
        run: at most one batch of work.
        cost: images it is worth.

    Raises:
        HeatlensError: what `run` raised, here in the method's own job.
    """
    result = yield Unbatched(run=partial(_caught, run), cost=cost)
    if isinstance(result, HeatlensError):
        raise result
    return result


def _caught(run: Callable[[], T]) -> T | HeatlensError:
    try:
        return run()
    except HeatlensError as error:
        return error
