"""`POST /v1/predict`: the classes of images."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.api import handler
from service.api.dependencies import ServiceDep
from service.api.openapi import INPUT, PREDICT, image_input, responses
from service.api.options import PredictOptions
from service.api.schemas import PredictResponse

router = APIRouter(prefix="/v1", tags=["predict"], default_response_class=Response)


@router.post(
    "/predict",
    summary="Classify images",
    responses=responses(PredictResponse, "Predictions.", errors=INPUT, example=PREDICT),
    openapi_extra=image_input(PredictOptions),
)
async def predict(request: Request, service: ServiceDep) -> Response:
    """The most probable classes of each image."""
    return await handler.respond(request, service, PredictOptions)
