"""The OpenAPI document: routes from FastAPI, answers from `schemas`, options from `options`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from models.imaging.decode import FORMATS
from models.types import ChannelStatistics, Faithfulness, LayerInfo, Quantiles
from service.api import schemas
from service.api.body import BYTES, FORM, JSON
from service.api.errors import CODES
from service.api.multipart import IMAGE_PART, OPTIONS_PART
from service.api.options import (
    AnyOptions,
    ExplainOptions,
    FeaturesOptions,
    ImageOption,
    PredictOptions,
    properties,
)
from service.api.schemas import (
    Box,
    ErrorResponse,
    ExplainResponse,
    ExplainResult,
    ExplanationResponse,
    FeaturesResponse,
    FeaturesResult,
    ImageData,
    ImageInfo,
    ModelUsed,
    PixelRegion,
    Point,
    Prediction,
    PredictResponse,
    PredictResult,
    StatisticsResponse,
    Timings,
    ValueRange,
)

_REF = "#/components/schemas/{model}"
_JSON_ONLY = frozenset({"interventions"})
_QUERY_TARGETS = {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16}

_ALWAYS = (404, 405, 500)
_KEYED = (401, *_ALWAYS)
_MODEL = (*_KEYED, 503)
_INPUT = (400, *_KEYED, 403, 413, 415, 422, 429, 503, 504)

_HEADERS: dict[str, Any] = {
    "X-Request-ID": {
        "description": "The request's id; a sane inbound one is kept.",
        "schema": {"type": "string"},
    },
    "Server-Timing": {
        "description": "Milliseconds per stage and in total.",
        "schema": {"type": "string"},
    },
}
_RETRY_AFTER: dict[str, Any] = {
    "Retry-After": {
        "description": "Seconds after which a retry makes sense.",
        "schema": {"type": "integer", "minimum": 1},
    }
}


def ref(name: str) -> dict[str, Any]:
    """Reference to a component."""
    return {"$ref": _REF.format(model=name)}


def answers(
    schema: Mapping[str, Any],
    description: str,
    *,
    errors: tuple[int, ...] = _KEYED,
    example: Any = None,
) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: what it answers, and the errors it may meet.

    Args:
        schema: of the JSON answer.
        description: of the answer.
        errors: statuses.
        example: an answer.
    """
    content: dict[str, Any] = {"schema": dict(schema)}
    if example is not None:
        content["example"] = example
    found: dict[int | str, dict[str, Any]] = {
        200: {"description": description, "content": {JSON: content}}
    }
    for status in sorted(errors):
        found[status] = error(status)
    return found


def error(status: int) -> dict[str, Any]:
    """The `responses` entry of an error status."""
    return {
        "description": f"Codes: {', '.join(f'`{code}`' for code in CODES[status])}.",
        "content": {JSON: {"schema": ref("ErrorResponse"), "example": ERROR}},
    }


def input_responses(
    name: str, description: str, *, example: Any
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that takes images."""
    return answers(ref(name), description, errors=_INPUT, example=example)


def model_responses(schema: Mapping[str, Any], description: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route about one model."""
    return answers(schema, description, errors=_MODEL)


def open_responses(schema: Mapping[str, Any], description: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that needs no key."""
    return answers(schema, description, errors=_ALWAYS)


def admin_responses(schema: Mapping[str, Any], description: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that needs an admin key."""
    return answers(schema, description, errors=(400, *_KEYED, 403, 413, 422, 503))


def repository_body(**fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of a route of the model repository: an object of these fields, or nothing.

    Args:
        fields: schema of each field beside `parameters`.
    """
    properties = {"parameters": {"type": "object"}, **fields}
    schema = {"type": "object", "properties": properties}
    return {"requestBody": {"required": False, "content": {JSON: {"schema": schema}}}}


def image_input(options: type[AnyOptions]) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes images: query parameters and the three input forms."""
    name = options.__name__
    picture = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "required": [IMAGE_PART],
        "properties": {
            IMAGE_PART: {"type": "array", "items": picture, "minItems": 1},
            OPTIONS_PART: ref(name),
        },
    }
    json_body: dict[str, Any] = {"schema": ref(_request_name(options))}
    if options is ExplainOptions:
        json_body["example"] = EXPLAIN_REQUEST
    return {
        "parameters": [*_query_parameters(options), _TIMEOUT_HEADER],
        "requestBody": {
            "required": True,
            "content": {
                FORM: {
                    "schema": form,
                    "encoding": {OPTIONS_PART: {"contentType": JSON}},
                },
                JSON: json_body,
                **{media_type: {"schema": picture} for media_type in (*FORMATS, BYTES)},
            },
        },
    }


_TIMEOUT_HEADER: dict[str, Any] = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "Deadline in milliseconds, if `timeout_s` is not given.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 86_400_000},
}


def _query_parameters(options: type[BaseModel]) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    for name, schema in properties(options).items():
        if name in _JSON_ONLY:
            continue
        described = {key: value for key, value in schema.items() if key != "title"}
        parameter: dict[str, Any] = {"name": name, "in": "query", "schema": described}
        if name == "targets":
            described |= _QUERY_TARGETS
        if described.get("type") == "array":
            parameter |= {"style": "form", "explode": False}
        if "anyOf" in described:  # optional: absent, never null, in a query
            described |= described.pop("anyOf")[0]
            del described["default"]
        if text := described.pop("description", None):
            parameter["description"] = text
        parameters.append(parameter)
    return parameters


def _request_name(options: type[BaseModel]) -> str:
    return options.__name__.replace("Options", "Request")


RESPONSES: tuple[type[Any], ...] = (
    schemas.ErrorResponse,
    schemas.PredictResponse,
    schemas.ExplainResponse,
    schemas.FeaturesResponse,
    schemas.ModelsResponse,
    schemas.CardResponse,
    LayerInfo,
    schemas.MethodResponse,
    schemas.AliveResponse,
    schemas.ReadyResponse,
    schemas.RepositoryModel,
)
"""Answers that are documented; what they contain follows by itself."""


def _response_schemas() -> dict[str, Any]:
    """JSON schemas of all answers, by name."""
    _, found = msgspec.json.schema_components(RESPONSES, ref_template=_REF.format(model="{name}"))
    for result in (schemas.PredictResult, schemas.ExplainResult, schemas.FeaturesResult):
        optional = ("warnings", "error")
        whole = [field for field in result.__struct_fields__ if field not in optional]
        found[result.__name__]["oneOf"] = [{"required": whole}, {"required": ["error"]}]
        del found[result.__name__]["required"]
    return found


def _components() -> dict[str, Any]:
    operations = (PredictOptions, ExplainOptions, FeaturesOptions)
    _, described = models_json_schema(
        [(model, "validation") for model in (*operations, ImageOption)], ref_template=_REF
    )
    found: dict[str, Any] = described["$defs"]
    for model in operations:
        options = found[model.__name__]
        found[_request_name(model)] = {
            **options,
            "title": _request_name(model),
            "description": "Images and options as JSON.",
            "properties": {
                "images": {"type": "array", "items": ref("ImageOption"), "minItems": 1},
                **options["properties"],
            },
            "required": ["images"],
        }
    found["ImageOption"]["oneOf"] = [
        {"required": [one], "properties": {one: {"type": "string"}}} for one in ("b64", "url")
    ]
    return {**found, **_response_schemas()}


def install(app: FastAPI) -> None:
    """Let the application describe itself by this document, made when it is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # FastAPI's own way to replace it


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
    )
    document["components"] = {
        **document.get("components", {}),
        "schemas": dict(sorted(_components().items())),
    }
    for path in document["paths"].values():
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]  # the framework's guess: a path is any text here
            for status, response in operation["responses"].items():
                retry = _RETRY_AFTER if status in ("429", "503") else {}
                response["headers"] = {**_HEADERS, **retry}
    return document


# ---------------------------------------------------------------- examples


_REQUEST_ID = "01JZ8Q4M7V9WK3T5R2XN6B1C0D"
_MODEL_USED = ModelUsed(name="efficientnet_lite0", version="1", device="cpu", precision="fp32")
_IMAGE = ImageInfo(
    width=500, height=375, region=PixelRegion(x=85.9, y=23.4, width=328.1, height=328.1)
)
_TABBY = Prediction(class_id=281, label="tabby", score=9.21, probability=0.61)
_TIMINGS = Timings(decode=2.1, queue=0.4, device=21.7, render=1.2, total=26.0)
_STATISTICS = StatisticsResponse(
    layer="bn2",
    kind="output",
    shape=(1280, 7, 7),
    mean=0.31,
    std=0.6,
    min=0.0,
    max=6.0,
    l2=12.4,
    sparsity=0.62,
    dead_channels=12,
    quantiles=Quantiles(p01=0.0, p25=0.0, p50=0.0, p75=0.4, p99=3.2),
    top_channels=(ChannelStatistics(index=711, mean=4.2, max=6.0, weight=0.031),),
)
_EXPLANATION = ExplanationResponse(
    method="gradcam",
    layer="bn2",
    target=_TABBY,
    heatmap=ImageData(media_type="image/png", width=224, height=224, data="iVBORw0KGgo="),
    overlay=ImageData(media_type="image/jpeg", width=224, height=224, data="/9j/4AAQSkY="),
    range=ValueRange(min=0.0, max=3.7),
    signed=False,
    degenerate=False,
    peak=Point(x=241.0, y=180.5),
    box=Box(x=120, y=60, width=260, height=290),
    faithfulness={"deletion": Faithfulness(value=0.11, random=0.32)},
)


def _builtins(answer: msgspec.Struct) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(answer)
    return built


PREDICT = _builtins(
    PredictResponse(
        request_id=_REQUEST_ID,
        model=_MODEL_USED,
        results=(PredictResult(image=_IMAGE, predictions=(_TABBY,), statistics=()),),
        timings_ms=_TIMINGS,
        batch_size=4,
    )
)
EXPLAIN = _builtins(
    ExplainResponse(
        request_id=_REQUEST_ID,
        model=_MODEL_USED,
        results=(
            ExplainResult(
                image=_IMAGE,
                predictions=(_TABBY,),
                explanations=(_EXPLANATION,),
                statistics=(_STATISTICS,),
            ),
        ),
        timings_ms=_TIMINGS,
        batch_size=4,
    )
)
FEATURES = _builtins(
    FeaturesResponse(
        request_id=_REQUEST_ID,
        model=_MODEL_USED,
        results=(FeaturesResult(image=_IMAGE, predictions=(_TABBY,), features=(_STATISTICS,)),),
        timings_ms=_TIMINGS,
        batch_size=4,
    )
)
ERROR = _builtins(
    ErrorResponse(
        error="Unknown method. Allowed: gradcam, layercam.",
        code="invalid_option",
        request_id=_REQUEST_ID,
        retryable=False,
        field="methods.0",
    )
)
EXPLAIN_REQUEST: dict[str, Any] = {
    "images": [{"b64": "iVBORw0KGgo=", "targets": ["tabby"]}],
    "methods": ["gradcam", "layercam"],
    "targets": ["top1", {"class": 281, "against": [282, "top2"]}],
}
