"""`POST /v1/predict`, `/v1/features` and `/v1/compare`: images in, JSON out."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.api import events, schemas
from service.api.dependencies import service_of
from service.api.handler import respond
from service.api.openapi import (
    COMPARE,
    EVENTS_CONTENT,
    FEATURES,
    INPUT,
    PREDICT,
    image_input,
    responses,
)
from service.api.options import AnyOptions, CompareOptions, FeaturesOptions, PredictOptions

router = APIRouter(prefix="/v1", default_response_class=Response)


def _described(
    options: type[AnyOptions], response: type[Any], text: str, *, example: Any
) -> dict[str, Any]:
    """What the OpenAPI document says of a route."""
    return {
        "tags": [options.operation],
        "responses": responses(response, text, errors=INPUT, example=example),
        "openapi_extra": image_input(options),
    }


_PREDICT = _described(PredictOptions, schemas.PredictResponse, "Predictions.", example=PREDICT)
_FEATURES = _described(
    FeaturesOptions, schemas.FeaturesResponse, "Statistics of layers.", example=FEATURES
)
_COMPARE = _described(
    CompareOptions, schemas.CompareResponse, "The similarity and maps.", example=COMPARE
)
_COMPARE["responses"][200]["content"][events.MEDIA_TYPE] = EVENTS_CONTENT


@router.post("/predict", summary="Classify images", **_PREDICT)
async def predict(request: Request) -> Response:
    """The most probable classes of each image."""
    return await respond(request, service_of(request), PredictOptions)


@router.post("/features", summary="Describe feature maps", **_FEATURES)
async def features(request: Request) -> Response:
    """Statistics of activations, inputs and gradients of any layers, with their top channels."""
    return await respond(request, service_of(request), FeaturesOptions)


@router.post("/compare", summary="Compare two images and show why", **_COMPARE)
async def compare(request: Request) -> Response:
    """The cosine of two images' vectors, and for each image maps of what makes them similar.

    For models of the task `embedding`. A map explains the cosine by its image, the other's vector
    held fixed. With `Accept: text/event-stream` the response is a stream of events, as that of
    `/v1/explain`.
    """
    if events.wanted(request.headers.get("accept", "")):
        return await events.respond(request, service_of(request), CompareOptions)
    return await respond(request, service_of(request), CompareOptions)
