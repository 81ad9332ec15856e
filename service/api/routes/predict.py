"""`POST /v1/predict`: what is in the images."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter, Request, Response

from service.api import handler, openapi
from service.api.dependencies import ServiceDep
from service.api.handler import json_response, model_used
from service.api.openapi import image_input, input_responses
from service.api.options import PredictOptions
from service.api.schemas import PredictResponse, PredictResult

router = APIRouter(prefix="/v1", tags=["predict"])


@router.post(
    "/predict",
    summary="Classify images",
    response_class=Response,
    responses=input_responses("PredictResponse", "Predictions.", example=openapi.PREDICT),
    openapi_extra=image_input(PredictOptions),
)
async def predict(request: Request, service: ServiceDep) -> Response:
    """The most probable classes of each image."""
    plan, reply = await handler.answer(request, service, PredictOptions)
    return json_response(
        PredictResponse(
            request_id=request.state.request_id,
            model=model_used(plan.info, reply),
            results=cast("tuple[PredictResult, ...]", reply.results),
            timings_ms=reply.timings,
            batch_size=reply.batch_size,
        )
    )
