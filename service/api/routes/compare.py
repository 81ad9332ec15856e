"""`POST /v1/compare`: how similar two images are, and what makes them so."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.api import handler
from service.api.dependencies import ServiceDep
from service.api.openapi import COMPARE, INPUT, image_input, responses
from service.api.options import CompareOptions
from service.api.schemas import CompareResponse

router = APIRouter(prefix="/v1", tags=["compare"], default_response_class=Response)


@router.post(
    "/compare",
    summary="Compare two images and show why",
    responses=responses(CompareResponse, "The similarity and maps.", errors=INPUT, example=COMPARE),
    openapi_extra=image_input(CompareOptions),
)
async def compare(request: Request, service: ServiceDep) -> Response:
    """The cosine of two images' vectors, and for each image maps of what makes them similar.

    For models of the task `embedding`. A map explains the cosine by its image, the other's vector
    held fixed.
    """
    return await handler.respond(request, service, CompareOptions)
