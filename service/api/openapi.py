"""The OpenAPI document: routes from FastAPI, responses from `schemas`, options from `options`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from models.imaging.decode import FORMATS
from models.imaging.locate import Box
from models.methods.table import Method
from models.types import ChannelStatistics, Faithfulness, LayerInfo, Quantiles, Region
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

_REF = "#/components/schemas/{model}"
_JSON_ONLY = frozenset({"interventions"})
_QUERY_TARGETS = {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16}

OPEN = (404, 405, 500)
"""Error statuses of routes that need no key."""
KEYED = (401, *OPEN)
"""Error statuses of routes that need a key."""
MODEL = (*KEYED, 503)
"""Error statuses of routes about one model."""
INPUT = (400, *KEYED, 403, 413, 415, 422, 429, 503, 504)
"""Error statuses of routes that take images."""
ADMIN = (400, *KEYED, 403, 413, 422, 503)
"""Error statuses of routes that need an admin key."""

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


def array_of(kind: type[Any]) -> dict[str, Any]:
    """The schema of a list of a component."""
    return {"type": "array", "items": _ref(kind.__name__)}


def responses(
    schema: type[Any] | Mapping[str, Any],
    description: str,
    *,
    errors: tuple[int, ...] = KEYED,
    example: Any = None,
) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: its JSON response and the errors it may return.

    Args:
        schema: the response, or its JSON schema.
        description: of the response.
        errors: statuses.
        example: a response.
    """
    shape = dict(schema) if isinstance(schema, Mapping) else _ref(schema.__name__)
    content = {"schema": shape} if example is None else {"schema": shape, "example": example}
    found: dict[int | str, dict[str, Any]] = {
        200: {"description": description, "content": {JSON: content}}
    }
    for status in sorted(errors):
        found[status] = {
            "description": f"Codes: {', '.join(f'`{code}`' for code in CODES[status])}.",
            "content": {JSON: {"schema": _ref("ErrorResponse"), "example": ERROR}},
        }
    return found


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(model=name)}


def repository_body(**fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of a route of the model repository, whose body is optional.

    Args:
        fields: schema of each field of the body in addition to `parameters`.
    """
    schema = {"type": "object", "properties": {"parameters": {"type": "object"}, **fields}}
    return {"requestBody": {"required": False, "content": {JSON: {"schema": schema}}}}


def image_input(options: type[AnyOptions]) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes images: query parameters and three body forms."""
    name = options.__name__
    image = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "required": [IMAGE_PART],
        "properties": {
            IMAGE_PART: {"type": "array", "items": image, "minItems": 1},
            OPTIONS_PART: _ref(name),
        },
    }
    json_body: dict[str, Any] = {"schema": _ref(_request_name(options))}
    if options is ExplainOptions:
        json_body["example"] = EXPLAIN_REQUEST
    return {
        "parameters": [*_query_parameters(options), _TIMEOUT_HEADER],
        "requestBody": {
            "required": True,
            "content": {
                FORM: {"schema": form, "encoding": {OPTIONS_PART: {"contentType": JSON}}},
                JSON: json_body,
                **{media_type: {"schema": image} for media_type in (*FORMATS, BYTES)},
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
        if "anyOf" in described:
            # Optional: absent, never null, in a query.
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
    Method,
    schemas.AliveResponse,
    schemas.ReadyResponse,
    schemas.RepositoryModel,
)
"""The documented responses; the structs that they contain are found through them."""


def _response_schemas() -> dict[str, Any]:
    """JSON schemas of all responses, by name."""
    _, found = msgspec.json.schema_components(RESPONSES, ref_template=_REF.format(model="{name}"))
    for schema in found.values():
        schema["description"] = schema["description"].partition("\n\n")[0]
        # A field with a default is sent like any other; only a field that is `UNSET` is absent.
        sent = {name for name, field in schema["properties"].items() if "default" in field}
        schema["required"] = [
            name for name in schema["properties"] if name in sent.union(schema["required"])
        ]
        for name in sent:
            del schema["properties"][name]["default"]
    for result in (schemas.PredictResult, schemas.ExplainResult, schemas.FeaturesResult):
        whole = [field for field in result.__struct_fields__ if field != "error"]
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
                "images": {"type": "array", "items": _ref("ImageOption"), "minItems": 1},
                **options["properties"],
            },
            "required": ["images"],
        }
    found["ImageOption"]["oneOf"] = [
        {"required": [one], "properties": {one: {"type": "string"}}} for one in ("b64", "url")
    ]
    return {**found, **_response_schemas()}


def install(app: FastAPI) -> None:
    """Make this the application's OpenAPI document, generated on its first use."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # as FastAPI documents it


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
                # The framework's guess, but no path parameter is refused here.
                del operation["responses"]["422"]
            for status, response in operation["responses"].items():
                retry = _RETRY_AFTER if status in ("429", "503") else {}
                response["headers"] = {**_HEADERS, **retry}
    return document


# ---------------------------------------------------------------- examples

_REQUEST_ID = "01JZ8Q4M7V9WK3T5R2XN6B1C0D"
_MODEL_USED = schemas.ModelUsed(
    name="efficientnet_lite0", version="1", device="cpu", precision="fp32"
)
_REGION = Region(x=85.9, y=23.4, width=328.1, height=328.1)
_IMAGE = schemas.ImageInfo(width=500, height=375, region=_REGION)
_TABBY = schemas.Prediction(class_id=281, label="tabby", score=9.21, probability=0.61)
_TIMINGS = schemas.Timings(decode=2.1, queue=0.4, device=21.7, render=1.2, total=26.0)
_STATISTICS = schemas.StatisticsResponse(
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
_EXPLANATION = schemas.ExplanationResponse(
    method="gradcam",
    layer="bn2",
    target=_TABBY,
    heatmap=schemas.ImageData(media_type="image/png", width=224, height=224, data="iVBORw0KGgo="),
    overlay=schemas.ImageData(media_type="image/jpeg", width=224, height=224, data="/9j/4AAQSkY="),
    range=schemas.ValueRange(min=0.0, max=3.7),
    signed=False,
    degenerate=False,
    peak=schemas.Point(x=241.0, y=180.5),
    box=Box(x=120, y=60, width=260, height=290),
    faithfulness={"deletion": Faithfulness(value=0.11, random=0.32)},
)


def _example(kind: Callable[..., msgspec.Struct], result: schemas.Result) -> Any:
    response = kind(
        request_id=_REQUEST_ID,
        model=_MODEL_USED,
        results=(result,),
        timings_ms=_TIMINGS,
        batch_size=4,
    )
    return msgspec.to_builtins(response)


PREDICT = _example(
    schemas.PredictResponse,
    schemas.PredictResult(image=_IMAGE, predictions=(_TABBY,), statistics=()),
)
EXPLAIN = _example(
    schemas.ExplainResponse,
    schemas.ExplainResult(
        image=_IMAGE,
        predictions=(_TABBY,),
        explanations=(_EXPLANATION,),
        statistics=(_STATISTICS,),
    ),
)
FEATURES = _example(
    schemas.FeaturesResponse,
    schemas.FeaturesResult(image=_IMAGE, predictions=(_TABBY,), features=(_STATISTICS,)),
)
ERROR: dict[str, Any] = {
    "error": "Unknown method. Allowed: gradcam, layercam.",
    "code": "invalid_option",
    "request_id": _REQUEST_ID,
    "retryable": False,
    "field": "methods.0",
}
EXPLAIN_REQUEST: dict[str, Any] = {
    "images": [{"b64": "iVBORw0KGgo=", "targets": ["tabby"]}],
    "methods": ["gradcam", "layercam"],
    "targets": ["top1", {"class": 281, "against": [282, "top2"]}],
}
