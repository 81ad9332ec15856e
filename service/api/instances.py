"""Requests of the dialects that send `instances`, files or forms, and name the model in their path."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import Request

from service.api.body import RequestBody, parse_query
from service.api.dependencies import Service
from service.api.handler import in_time
from service.api.json import validate
from service.api.options import ExplainOptions, PredictOptions

_HOLDERS = ("image", "image_bytes", "data", "body")
_TRUE = (True, "true", "1")


async def read_request(
    request: Request,
    service: Service,
    *,
    model: str | None,
    explains: bool = False,
    more: Iterable[tuple[str, str]] = (),
) -> RequestBody[Any]:
    """Read a body with `instances`, or in any form of the native API.

    Args:
        request: the request.
        service: the parts of the application.
        model: the model; None = the one among the options, or the default.
        explains: whether an explanation is asked for, unless the option `explain` says so.
        more: options from elsewhere in the request, as text.

    Raises:
        HeatlensError: the body or an option is wrong.
    """
    reading = service.reader.parse(request, ExplainOptions, instance=read_instance)
    images, values = await in_time(service, reading)
    values |= parse_query(more, ExplainOptions)
    explains = values.pop("explain", explains) in _TRUE
    if model is not None:
        values["model"] = model
    kind = ExplainOptions if explains else PredictOptions
    return RequestBody(images=images, options=validate(kind, values))


def read_instance(instance: Any) -> Any:
    """Make an element of the native `images` of an instance, in whichever way it holds its image.

    Anything else is left as it is, and refused where `images` are checked.
    """
    if isinstance(instance, str):
        return {"b64": instance}
    if not isinstance(instance, dict):
        return instance
    found = dict(instance)
    # Samples of TensorFlow Serving number their instances.
    found.pop("key", None)
    for holder in _HOLDERS:
        if holder in found:
            held = found.pop(holder)
            found |= held if isinstance(held, dict) else {"b64": held}
    if "target" in found:
        found["targets"] = [found.pop("target")]
    return found
