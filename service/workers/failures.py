"""Typed errors as data, and back: no exception object crosses a process."""

from __future__ import annotations

from models.errors import ERRORS, HeatlensError, InternalError
from models.types import Failure

to_failure = Failure.of


def to_error(failure: Failure) -> HeatlensError:
    """The exception that a failure stands for; an unknown code is an internal error."""
    kind = ERRORS.get(failure.code, InternalError)
    return kind(failure.message, field=failure.field, retry_after_s=failure.retry_after_s)
