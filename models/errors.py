"""Every error that a caller can meet, one class for each code.

    HeatlensError
    ├── MalformedBody            malformed_body            the HTTP layer, before decoding
    ├── RequestTimeout           request_timeout           the connection, before the application
    ├── HeadersTooLarge          headers_too_large
    ├── Unauthorized             unauthorized              security
    ├── Forbidden                forbidden                 security
    │   ├── UrlInputDisabled     url_input_disabled
    │   └── AdminDisabled        admin_disabled
    ├── UnknownModel             unknown_model             resolving the request against the models
    ├── UnknownRoute             unknown_route
    ├── UnknownLabel             unknown_label
    ├── UnknownLayer             unknown_layer
    ├── MethodNotAllowed         method_not_allowed        HTTP verb
    ├── BodyTooLarge             body_too_large            reading the body
    ├── ImageTooLarge            image_too_large           decoding, before pixels are touched
    ├── TooManyImages            too_many_images
    ├── UnsupportedMediaType     unsupported_media_type
    ├── InvalidOption            invalid_option            resolving options
    ├── ImageUndecodable         image_undecodable         decoding
    ├── ImageTooSmall            image_too_small
    ├── TargetOutOfRange         target_out_of_range       resolving targets
    ├── MethodNotApplicable      method_not_applicable     resolving methods
    ├── Overloaded               overloaded                admission in the device worker
    ├── DeadlineExceeded         deadline_exceeded         anywhere after acceptance
    ├── Cancelled                cancelled                 the client left (logged as 499)
    ├── NotReady                 not_ready                 no warm model yet, or a failed load
    ├── ModelReplaced            model_replaced            replaced or unloaded under way
    ├── Draining                 draining                  the service is stopping
    ├── WorkerLost               worker_lost               a device worker died, no retry left
    ├── ModelLoadFailed          model_load_failed         loading or verifying a model
    ├── InputQuarantined         input_quarantined         the input was in two worker deaths
    └── InternalError            internal                  a fault of ours

The text of an error is written by us: it names the field and the allowed values and never repeats
what a third-party library said. Statuses live in one table in `service/api/errors.py`.
"""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, Self


class HeatlensError(Exception):
    """Base of all typed errors.

    Attributes:
        code: snake_case code of the wire contract.
        retryable: whether the same request may succeed later.
        message: fixed human text.
        field: dotted path of the offending option (`methods.0`), if one is at fault.
        retry_after_s: seconds after which a retry makes sense, if known.
    """

    code: ClassVar[str]
    retryable: ClassVar[bool]

    def __init_subclass__(cls, *, code: str | None = None, retryable: bool = False) -> None:
        """The code is the name of the class, in snake_case."""
        cls.code = code or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        cls.retryable = retryable

    def __init__(
        self, message: str, *, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def alone(self) -> Self:
        """The same without its traceback, which holds tensors."""
        return type(self)(self.message, field=self.field, retry_after_s=self.retry_after_s)


class MalformedBody(HeatlensError):
    """The body is empty, truncated or not of its content type."""


class RequestTimeout(HeatlensError, retryable=True):
    """The request arrives too slowly."""


class HeadersTooLarge(HeatlensError):
    """The request has too many headers, or too long ones."""


class Unauthorized(HeatlensError):
    """The request has no key, or an unknown one."""


class Forbidden(HeatlensError):
    """The key is known but does not allow this."""


class UrlInputDisabled(Forbidden):
    """The operator has not allowed this URL, or URLs at all."""


class AdminDisabled(Forbidden):
    """No admin key is configured."""


class UnknownModel(HeatlensError):
    """No model of that name or version is configured."""


class UnknownRoute(HeatlensError):
    """There is no such path."""


class UnknownLabel(HeatlensError):
    """The model has no class of that label."""


class UnknownLayer(HeatlensError):
    """No layer of the model matches the name or glob."""


class MethodNotAllowed(HeatlensError):
    """The path exists, the HTTP verb does not."""


class BodyTooLarge(HeatlensError):
    """The body exceeds `limits.max_body_mb`."""


class ImageTooLarge(HeatlensError):
    """One image exceeds the byte or pixel cap."""


class TooManyImages(HeatlensError):
    """More images than `limits.max_images`."""


class UnsupportedMediaType(HeatlensError):
    """Neither an image format nor a body type that is accepted."""


class InvalidOption(HeatlensError):
    """An option has a value outside its range."""


class ImageUndecodable(HeatlensError):
    """The bytes claim to be an image but cannot be decoded."""


class ImageTooSmall(HeatlensError):
    """The image has too few pixels to be classified."""


class TargetOutOfRange(HeatlensError):
    """A class index or rank beyond the model's classes."""


class MethodNotApplicable(HeatlensError):
    """The method cannot explain this model or layer; the text says which can."""


class Overloaded(HeatlensError, retryable=True):
    """The estimated wait is over the limit; retry after `retry_after_s`."""


class DeadlineExceeded(HeatlensError):
    """The request's deadline passed before its answer was ready."""


class Cancelled(HeatlensError):
    """The client went away; nobody reads this answer."""


class NotReady(HeatlensError, retryable=True):
    """No warm model can answer yet."""


class ModelReplaced(HeatlensError, retryable=True):
    """The model was replaced or unloaded after the request was resolved; resolve it again."""


class Draining(HeatlensError, retryable=True):
    """The service is shutting down and takes no new work."""


class WorkerLost(HeatlensError, retryable=True):
    """The device worker died and the job could not be retried in time."""


class ModelLoadFailed(HeatlensError):
    """The model could not be loaded or failed its verification; the text says why.

    Attributes:
        cause: what was raised, and where, in words that only the operator may read.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        cause: str | None = None,
    ) -> None:
        super().__init__(message, field=field, retry_after_s=retry_after_s)
        self.cause = cause


class InputQuarantined(HeatlensError):
    """This input was on the device in two worker deaths and is not tried again."""


class InternalError(HeatlensError, code="internal"):
    """A fault of the service itself; details are in its logs."""


def close_names(name: str, known: Iterable[str]) -> str:
    """Names like a wrong one, as the end of an error; empty if there are none."""
    close = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f" Close names: {', '.join(close)}." if close else ""


def cause_of(error: BaseException) -> str | None:
    """What an error was raised from: type, text, and the place in the operator's own code.

    That place is the innermost frame outside of this package and of installed libraries. None for
    errors that were raised from nothing.
    """
    cause = error.__cause__
    if cause is None:
        return None
    frames = traceback.extract_tb(cause.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)]
    text = f"{type(cause).__name__}: {cause}".removesuffix(": ")
    return f"{text} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else text


def _is_library(filename: str) -> bool:
    """Whether a file belongs to this package, to Python, or to an installed distribution."""
    path = Path(filename)
    own = (Path(__file__).parent, Path(sysconfig.get_path("stdlib")))
    return (
        filename.startswith("<")
        or any(map(path.is_relative_to, own))
        or any(next(parent.glob("*.dist-info"), None) for parent in path.parents)
    )


def _leaves(root: type[HeatlensError]) -> list[type[HeatlensError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _leaves(child))]


ERRORS: dict[str, type[HeatlensError]] = {
    error.code: error for error in _leaves(HeatlensError) if error is not HeatlensError
}
"""Error class by its code."""
