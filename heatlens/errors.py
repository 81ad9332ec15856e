"""The errors of the client."""

from __future__ import annotations


class HeatlensError(Exception):
    """Base of all errors of the client."""


class ConnectionFailed(HeatlensError):
    """The service could not be reached, or the connection broke before the response was complete."""


class TimedOut(ConnectionFailed):
    """The service did not answer within the client's `timeout_s`."""


class LoadFailed(HeatlensError):
    """A model could not be loaded into this process."""


class APIError(HeatlensError):
    """The service refused a request, or could not answer it.

    Attributes:
        code: stable code to program against, such as `unknown_model` or `overloaded`.
        message: human-readable text.
        status: HTTP status; 0 if the error came in a stream of events.
        field: the option that is to blame, such as `methods.0`.
        request_id: id of the request in the logs of the service.
        retryable: whether the same request may succeed later.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int,
        field: str | None = None,
        request_id: str | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.field = field
        self.request_id = request_id
        self.retryable = retryable

    def __str__(self) -> str:
        where = f" (option {self.field})" if self.field else ""
        return f"{self.message}{where} [{self.code}]"
