"""`POST /v1/features`: what the layers of the model make of the images."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter, Request, Response

from service.api import handler, openapi
from service.api.dependencies import ServiceDep
from service.api.handler import json_response, model_used
from service.api.openapi import image_input, input_responses
from service.api.options import FeaturesOptions
from service.api.schemas import FeaturesResponse, FeaturesResult

router = APIRouter(prefix="/v1", tags=["features"])


@router.post(
    "/features",
    summary="Describe feature maps",
    response_class=Response,
    responses=input_responses(
        "FeaturesResponse", "Statistics of layers.", example=openapi.FEATURES
    ),
    openapi_extra=image_input(FeaturesOptions),
)
async def features(request: Request, service: ServiceDep) -> Response:
    """Statistics of activations, inputs and gradients of any layers, and their strongest channels."""
    plan, reply = await handler.answer(request, service, FeaturesOptions)
    return json_response(
        FeaturesResponse(
            request_id=request.state.request_id,
            model=model_used(plan.info, reply),
            results=cast("tuple[FeaturesResult, ...]", reply.results),
            timings_ms=reply.timings,
            batch_size=reply.batch_size,
        )
    )
