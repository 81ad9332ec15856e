"""The door: requests that would wait for too long are refused before their bodies are read."""

from __future__ import annotations

from fastapi import Request

from service.api.body import BYTES
from service.api.dependencies import ServiceDep

# To read a larger body costs more than it is worth to find out that its job is a long one.
_SMALL_BODY = 1_000_000
_IMAGES = ("image/", BYTES, "application/x-image")
_LONG_OPTIONS = frozenset({"methods", "faithfulness", "kinds", "layers", "targets"})


async def refuse_excess(request: Request, service: ServiceDep) -> None:
    """Refuse a request for images while the service is at its limit.

    Raises:
        Overloaded: it is; the body is not read.
    """
    if request.method == "POST":
        service.pipeline.refuse_unread(may_be_long=_may_be_long(request))


def _may_be_long(request: Request) -> bool:
    """Whether a request may ask for a long job: most of its options may be in its body."""
    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) > _SMALL_BODY:
        return False
    is_image = request.headers.get("content-type", "").startswith(_IMAGES)
    has_options = "inference-header-content-length" in request.headers
    return not is_image or has_options or not _LONG_OPTIONS.isdisjoint(request.query_params)
