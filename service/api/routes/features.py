"""`POST /v1/features`: statistics of the model's layers for images."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.api import handler
from service.api.dependencies import ServiceDep
from service.api.openapi import FEATURES, INPUT, image_input, responses
from service.api.options import FeaturesOptions
from service.api.schemas import FeaturesResponse

router = APIRouter(prefix="/v1", tags=["features"], default_response_class=Response)


@router.post(
    "/features",
    summary="Describe feature maps",
    responses=responses(FeaturesResponse, "Statistics of layers.", errors=INPUT, example=FEATURES),
    openapi_extra=image_input(FeaturesOptions),
)
async def features(request: Request, service: ServiceDep) -> Response:
    """Statistics of activations, inputs and gradients of any layers, with their top channels."""
    return await handler.respond(request, service, FeaturesOptions)
