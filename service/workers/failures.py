"""Typed errors as data, and back: no exception object crosses a process."""

from __future__ import annotations

from models.errors import ERRORS, HeatlensError, InternalError
from models.types import Failure


def to_failure(job_id: str, error: HeatlensError) -> Failure:
    """The failure that ends `job_id` (or a request of that id) with `error`."""
    return Failure(
        id=job_id,
        code=error.code,
        message=error.message,
        field=error.field,
        retry_after_s=error.retry_after_s,
    )


def to_error(failure: Failure) -> HeatlensError:
    """The exception that a failure stands for; an unknown code is an internal error."""
    kind = ERRORS.get(failure.code, InternalError)
    return kind(failure.message, field=failure.field, retry_after_s=failure.retry_after_s)
