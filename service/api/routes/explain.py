"""`POST /v1/explain`: predictions with heatmaps that show why."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import cast, get_args
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from msgspec import structs

from models.errors import InvalidOption
from models.imaging.render import OverlayFormat
from service.api import events, handler
from service.api.accept import preferred
from service.api.dependencies import service_of
from service.api.openapi import BINARY, EVENTS_CONTENT, EXPLAIN, INPUT, image_input, responses
from service.api.options import ExplainOptions
from service.api.pipeline import Reply
from service.api.plan import Plan
from service.api.schemas import ExplainResponse, ExplainResult, ExplanationResponse, ImageData

router = APIRouter(prefix="/v1", tags=["explain"], default_response_class=Response)

_FORMATS: Mapping[str, OverlayFormat] = {f"image/{name}": name for name in get_args(OverlayFormat)}
_RESPONSES = responses(
    ExplainResponse, "Predictions and explanations.", errors=INPUT, example=EXPLAIN
)
_RESPONSES[200]["content"] |= {media_type: {"schema": BINARY} for media_type in _FORMATS}
_RESPONSES[200]["content"][events.MEDIA_TYPE] = EVENTS_CONTENT


@router.post(
    "/explain",
    summary="Classify images and show why",
    responses=_RESPONSES,
    openapi_extra=image_input(ExplainOptions),
)
async def explain(request: Request) -> Response:
    """Predictions with heatmaps, and statistics of the explained layers.

    With `Accept: image/png`, `image/jpeg` or `image/webp`, and one image, method, target and layer,
    the response is the overlay itself; `X-Class-Id`, `X-Label` (percent-encoded) and
    `X-Probability` describe its target.

    With `Accept: text/event-stream` the response is a stream of events whose data are JSON:
    `progress` (`ProgressEvent`) at least every second, `partial` (`PartialEvent`) if `partial_maps`
    is true and the maps take shape step by step, and in the end `result` with the JSON response, or
    `error` with the JSON of an error. An error before the stream begins is an ordinary one. Closing
    the stream cancels the request.
    """
    service, accept = service_of(request), request.headers.get("accept", "")
    if events.wanted(accept, instead_of=(*_FORMATS, "image/*")):
        return await events.respond(request, service, ExplainOptions)

    def adapt(plan: Plan) -> Plan:
        wanted = overlay_format(accept, plan.render.overlay_format)
        return plan if wanted is None else _for_overlay(plan, wanted)

    plan, reply = await handler.run(request, service, ExplainOptions, adapt=adapt)
    if overlay_format(accept, plan.render.overlay_format) is not None:
        return _overlay_response(reply)
    return handler.images_response(request, plan, reply)


def overlay_format(accept: str, default: OverlayFormat) -> OverlayFormat | None:
    """The image format that an `Accept` header prefers to JSON; None if it asks for no image.

    `default` is the format for `image/*`.
    """
    return preferred(accept, {**_FORMATS, "image/*": default})


def _for_overlay(plan: Plan, wanted: OverlayFormat) -> Plan:
    """Narrow a plan to one overlay.

    Raises:
        InvalidOption: it asks for more than one.
    """
    options = plan.images[0].options
    layers = options.layers if options.fuse == "none" else options.layers[:1]
    counts = {
        "images": len(plan.images),
        "methods": len(options.methods),
        "targets": len(options.targets),
        "layers": len(layers),
    }
    for field, count in counts.items():
        if count != 1:
            raise InvalidOption("A response that is an image shows exactly one.", field=field)
    render = structs.replace(plan.render, outputs=("overlay",), overlay_format=wanted)
    return structs.replace(plan, render=render)


def _overlay_response(reply: Reply) -> Response:
    """The one overlay as a response of its own."""
    result = cast("ExplainResult", reply.results[0])
    explanation = cast("tuple[ExplanationResponse, ...]", result.explanations)[0]
    overlay = cast("ImageData", explanation.overlay)
    target = explanation.target
    return Response(
        base64.b64decode(overlay.data),
        media_type=overlay.media_type,
        headers={
            "X-Class-Id": str(target.class_id),
            "X-Label": quote(target.label, safe=""),
            "X-Probability": f"{target.probability:.6f}",
            "Vary": "Accept",
        },
    )
