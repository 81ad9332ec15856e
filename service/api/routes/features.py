"""`POST /v1/features`: statistics of the model's layers for images."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.api import handler, openapi
from service.api.dependencies import ServiceDep
from service.api.options import FeaturesOptions
from service.api.schemas import FeaturesResponse

router = APIRouter(prefix="/v1", tags=["features"])


@router.post(
    "/features",
    summary="Describe feature maps",
    response_class=Response,
    responses=openapi.responses(
        FeaturesResponse, "Statistics of layers.", errors=openapi.INPUT, example=openapi.FEATURES
    ),
    openapi_extra=openapi.image_input(FeaturesOptions),
)
async def features(request: Request, service: ServiceDep) -> Response:
    """Statistics of activations, inputs and gradients of any layers, with their top channels."""
    return await handler.respond(request, service, FeaturesOptions, FeaturesResponse)
