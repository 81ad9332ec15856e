"""`POST /v1/predict`: the classes of images."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.api import handler, openapi
from service.api.dependencies import ServiceDep
from service.api.options import PredictOptions
from service.api.schemas import PredictResponse

router = APIRouter(prefix="/v1", tags=["predict"])


@router.post(
    "/predict",
    summary="Classify images",
    response_class=Response,
    responses=openapi.responses(
        PredictResponse, "Predictions.", errors=openapi.INPUT, example=openapi.PREDICT
    ),
    openapi_extra=openapi.image_input(PredictOptions),
)
async def predict(request: Request, service: ServiceDep) -> Response:
    """The most probable classes of each image."""
    return await handler.respond(request, service, PredictOptions, PredictResponse)
