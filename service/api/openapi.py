"""The OpenAPI document: routes from FastAPI, responses from `schemas`, options from `options`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from models.imaging.decode import FORMATS
from models.methods.table import Method
from models.types import LayerInfo
from service.api import schemas
from service.api.body import BYTES, FORM, JSON
from service.api.errors import CODES
from service.api.multipart import IMAGE_PART, OPTIONS_PART
from service.api.options import (
    AnyOptions,
    CompareOptions,
    ExplainOptions,
    FeaturesOptions,
    ImageOption,
    PredictOptions,
    properties,
)

_REF = "#/components/schemas/{model}"
_JSON_ONLY = frozenset({"interventions"})
_QUERY_TARGETS = {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16}

# Error statuses of routes: without a key, with one, about a model, for images, with an admin key.
OPEN = (404, 405, 500)
KEYED = (401, *OPEN)
MODEL = (*KEYED, 503)
INPUT = (400, *KEYED, 403, 408, 413, 415, 422, 429, 431, 503, 504)
ADMIN = (400, *KEYED, 403, 413, 422, 503)

BINARY = {"type": "string", "format": "binary"}

_KEYS = {
    "HTTPBearer": {
        "type": "http",
        "description": "`Authorization: Bearer KEY`",
        "scheme": "bearer",
    },
    "APIKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
TAKES_KEY: dict[str, Any] = {"security": [{name: []} for name in _KEYS]}
"""What describes that an operation takes a key; each that may answer 401 is described so."""


def _header(description: str, **schema: Any) -> dict[str, Any]:
    return {"description": description, "schema": schema}


_HEADERS = {
    "X-Request-ID": _header("The request's id; a sane inbound one is kept.", type="string"),
    "Server-Timing": _header("Milliseconds per stage and in total.", type="string"),
}
_RETRY_AFTER = _header("Seconds after which a retry makes sense.", type="integer", minimum=1)
_TIMEOUT_HEADER = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "Deadline in milliseconds, if `timeout_s` is not given.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 86_400_000},
}


def array_of(*kinds: type[Any]) -> dict[str, Any]:
    """The schema of a list of components, each of one of `kinds`."""
    refs = [ref_to(kind.__name__) for kind in kinds]
    return {"type": "array", "items": refs[0] if len(refs) == 1 else {"anyOf": refs}}


def object_of(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object that has all these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def responses(
    schema: type[Any] | Mapping[str, Any],
    description: str,
    *,
    errors: tuple[int, ...] = KEYED,
    example: Any = None,
    error: type[Any] | None = None,
) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: its JSON response (or the schema of it) and its error statuses.

    `error` is the shape of errors where it is not that of the native API.
    """
    shape = schema if isinstance(schema, Mapping) else ref_to(schema.__name__)
    found: dict[int | str, dict[str, Any]] = {200: _json_content(description, shape, example)}
    for status in sorted(errors):
        codes = ", ".join(f"`{code}`" for code in CODES[status])
        shape, shown = (
            (ref_to("ErrorResponse"), ERROR) if error is None else (ref_to(error.__name__), None)
        )
        found[status] = _json_content(f"Codes: {codes}.", shape, shown)
    return found


def _json_content(description: str, schema: Mapping[str, Any], example: Any) -> dict[str, Any]:
    media = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {"description": description, "content": {JSON: media}}


def ref_to(name: str) -> dict[str, Any]:
    """The schema of a component, by its name."""
    return {"$ref": _REF.format(model=name)}


def image_input(options: type[AnyOptions]) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes images: query parameters and three body forms."""
    form = {
        "type": "object",
        "required": [IMAGE_PART],
        "properties": {
            IMAGE_PART: {"type": "array", "items": BINARY, "minItems": 1},
            OPTIONS_PART: ref_to(options.__name__),
        },
    }
    json_body: dict[str, Any] = {"schema": ref_to(_request_name(options))}
    if options is ExplainOptions:
        json_body["example"] = EXPLAIN_REQUEST
    content = {
        FORM: {"schema": form, "encoding": {OPTIONS_PART: {"contentType": JSON}}},
        JSON: json_body,
        **{media_type: {"schema": BINARY} for media_type in (*FORMATS, BYTES)},
    }
    return {
        "parameters": [*_query_parameters(options), _TIMEOUT_HEADER],
        "requestBody": {"required": True, "content": content},
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
        # Optional: absent, never null, in a query.
        if "anyOf" in described:
            described |= described.pop("anyOf")[0]
            del described["default"]
        if text := described.pop("description", None):
            parameter["description"] = text
        parameters.append(parameter)
    return parameters


def _request_name(options: type[BaseModel]) -> str:
    return options.__name__.replace("Options", "Request")


# ---------------------------------------------------------------- document


def install(
    app: FastAPI, *, requests: Sequence[type[Any]] = (), responses: Sequence[type[Any]] = ()
) -> None:
    """Make this the application's OpenAPI document, generated on its first use.

    `requests` and `responses` are structs of dialects, in addition to those of the native API.
    """
    generate = app.openapi

    @functools.cache
    def document() -> dict[str, Any]:
        found = {
            **_option_schemas(),
            **_struct_schemas(requests),
            **_response_schemas([*_RESPONSES, *responses]),
        }
        return _complete(generate(), found)

    app.openapi = document  # type: ignore[method-assign] # as FastAPI documents it


def _complete(document: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    document["components"] = {"schemas": dict(sorted(found.items())), "securitySchemes": _KEYS}
    for path in document["paths"].values():
        for operation in path.values():
            # The framework's guess, but no path parameter is refused here.
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
            if "401" in operation["responses"]:
                operation.update(TAKES_KEY)
            for status, response in operation["responses"].items():
                retry = {"Retry-After": _RETRY_AFTER} if status in ("429", "503") else {}
                response["headers"] = {**_HEADERS, **retry}
    return document


# The documented responses; the structs that they contain are found through them.
_RESPONSES: tuple[type[Any], ...] = (
    schemas.ErrorResponse,
    schemas.PredictResponse,
    schemas.ExplainResponse,
    schemas.FeaturesResponse,
    schemas.CompareResponse,
    schemas.ProgressEvent,
    schemas.PartialEvent,
    schemas.ModelsResponse,
    schemas.AliveResponse,
    schemas.ReadyResponse,
    schemas.RepositoryModel,
    LayerInfo,
    Method,
)


def _struct_schemas(kinds: Sequence[type[Any]]) -> dict[str, Any]:
    """JSON schemas of structs, by name."""
    _, found = msgspec.json.schema_components(kinds, ref_template=_REF.format(model="{name}"))
    return found


def _response_schemas(kinds: Sequence[type[Any]]) -> dict[str, Any]:
    """JSON schemas of responses, by name."""
    found = _struct_schemas(kinds)
    for schema in found.values():
        schema["description"] = schema["description"].partition("\n\n")[0]
        # A field with a default is sent like any other; only a field that is `UNSET` is absent.
        fields = schema["properties"].items()
        schema["required"] = [n for n, f in fields if n in schema["required"] or "default" in f]
        for _, field in fields:
            field.pop("default", None)
    for result in (schemas.PredictResult, schemas.ExplainResult, schemas.FeaturesResult):
        optional = ("warnings", "error")
        whole = [field for field in result.__struct_fields__ if field not in optional]
        found[result.__name__]["oneOf"] = [{"required": whole}, {"required": ["error"]}]
        del found[result.__name__]["required"]
    compared = found[schemas.CompareResult.__name__]
    compared["required"] = ["image", "explanations"]
    # Without two good images there is no answer.
    for never in ("error", "predictions"):
        del compared["properties"][never]
    return found


def _option_schemas() -> dict[str, Any]:
    """JSON schemas of all options, and of the JSON bodies that hold them, by name."""
    operations = (PredictOptions, ExplainOptions, FeaturesOptions, CompareOptions)
    _, described = models_json_schema(
        [(model, "validation") for model in (*operations, ImageOption)], ref_template=_REF
    )
    found: dict[str, Any] = described["$defs"]
    images = {"type": "array", "items": ref_to("ImageOption"), "minItems": 1}
    for model in operations:
        options = found[model.__name__]
        found[_request_name(model)] = {
            **options,
            "title": _request_name(model),
            "description": "Images and options as JSON.",
            "properties": {"images": images, **options["properties"]},
            "required": ["images"],
        }
    found["ImageOption"]["oneOf"] = [
        {"required": [one], "properties": {one: {"type": "string"}}} for one in ("b64", "url")
    ]
    return found


# ---------------------------------------------------------------- examples


ERROR: dict[str, Any] = {
    "error": "Unknown method. Allowed: gradcam, layercam.",
    "code": "invalid_option",
    "request_id": "01JZ8Q4M7V9WK3T5R2XN6B1C0D",
    "retryable": False,
    "field": "methods.0",
}
EXPLAIN_REQUEST: dict[str, Any] = {
    "images": [{"b64": "iVBORw0KGgo=", "targets": ["tabby"]}],
    "methods": ["gradcam", "layercam"],
    "targets": ["top1", {"class": 281, "against": [282, "top2"]}],
}
EXPLAIN: dict[str, Any] = msgspec.json.decode("""{
  "request_id": "01JZ8Q4M7V9WK3T5R2XN6B1C0D",
  "model": {"name": "efficientnet_lite0", "version": "1", "device": "cpu", "precision": "fp32"},
  "results": [{
    "image": {
      "width": 500, "height": 375,
      "region": {"x": 85.9, "y": 23.4, "width": 328.1, "height": 328.1}
    },
    "predictions": [{"class_id": 281, "label": "tabby", "score": 9.21, "probability": 0.61}],
    "explanations": [{
      "method": "gradcam", "layer": "bn2",
      "target": {"class_id": 281, "label": "tabby", "score": 9.21, "probability": 0.61},
      "heatmap": {"media_type": "image/png", "width": 224, "height": 224, "data": "iVBORw0KGgo="},
      "overlay": {"media_type": "image/jpeg", "width": 224, "height": 224, "data": "/9j/4AAQSkY="},
      "range": {"min": 0.0, "max": 3.7}, "signed": false, "degenerate": false,
      "peak": {"x": 241.0, "y": 180.5}, "box": {"x": 120, "y": 60, "width": 260, "height": 290},
      "faithfulness": {"deletion": {"value": 0.11, "random": 0.32}}, "warnings": []
    }],
    "statistics": [{
      "layer": "bn2", "kind": "output", "shape": [1280, 7, 7],
      "mean": 0.31, "std": 0.6, "min": 0.0, "max": 6.0, "l2": 12.4,
      "sparsity": 0.62, "dead_channels": 12,
      "quantiles": {"p01": 0.0, "p25": 0.0, "p50": 0.0, "p75": 0.4, "p99": 3.2},
      "top_channels": [{"index": 711, "mean": 4.2, "max": 6.0, "weight": 0.031}]
    }]
  }],
  "timings_ms": {"decode": 2.1, "queue": 0.4, "device": 21.7, "render": 1.2, "total": 26.0},
  "batch_size": 4
}""")
EVENTS = """event: progress
data: {"what":"rise","done":1200,"total":4000,"seconds_left":21.4}

event: partial
data: {"image":0,"explanation":{"method":"rise","layer":"", …}}

event: result
data: {"request_id":"01JZ8Q4M7V9WK3T5R2XN6B1C0D","model":{"name":"efficientnet_lite0", …}, …}

"""
EVENTS_CONTENT = {"schema": {"type": "string"}, "example": EVENTS}
_RESULT = EXPLAIN["results"][0]
_IMAGE = {key: _RESULT[key] for key in ("image", "predictions")}
_MAP = {
    key: value
    for key, value in _RESULT["explanations"][0].items()
    if key not in ("target", "faithfulness")
}
_COMPARED = {"image": _RESULT["image"], "explanations": [_MAP]}
COMPARE = {**EXPLAIN, "similarity": 0.83, "results": [_COMPARED, _COMPARED]}
PREDICT = {**EXPLAIN, "results": [{**_IMAGE, "statistics": []}]}
FEATURES = {**EXPLAIN, "results": [{**_IMAGE, "features": _RESULT["statistics"]}]}
