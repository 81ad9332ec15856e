"""Requests that the OpenAPI document allows get a documented response, and never a fault."""

from __future__ import annotations

import base64
import copy
import io
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from PIL import Image
from schemathesis.pytest.lazy import get_all_tests
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.api.app import create_app
from service.settings import Settings
from tests.fakes import FakePool


def no_fault(_: Any, response: Any, __: schemathesis.Case) -> None:
    """A deadline of a millisecond may pass; nothing else is the server's fault here."""
    assert response.status_code < 500 or response.status_code == 504, response.text


CHECKS = [
    no_fault,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def draw() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = draw()
B64 = base64.b64encode(PNG).decode()


@schemathesis.serializer("image/bmp", "image/tiff")
def serialize_image(_: Any, value: Any) -> bytes:
    """An image is generated as a string of any bytes."""
    return value if isinstance(value, bytes) else str(value).encode()


app = create_app(Settings(limits={"max_images": 4}), FakePool())
document = app.openapi()


def schema_of(*paths: str) -> Any:
    """The document of some paths alone; cases are sent to the application."""
    chosen = {path: document["paths"][path] for path in paths}
    schema = schemathesis.openapi.from_dict(copy.deepcopy({**document, "paths": chosen}))
    schema.app = app
    return schema


def check(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)


# To make the cases of all paths takes most of a minute, so it is not done when tests are collected.
# Paths with a version, and PUT, are second names of the same routes.
@pytest.mark.parametrize("path", [path for path in document["paths"] if "{version}" not in path])
def test_documented_requests(path: str) -> None:
    chosen = settings(max_examples=10, suppress_health_check=list(HealthCheck))
    schema = schema_of(path).exclude(method="PUT")
    tests = get_all_tests(schema=schema, test_func=check, settings=chosen, given_kwargs={})
    for result in tests:
        _, run = result.ok()
        run()


options_schema = schema_of("/v1/predict", "/v1/explain", "/v1/features")
options_schema.config.phases.coverage.enabled = False


@options_schema.parametrize()
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
def test_documented_options_of_a_real_image(case: schemathesis.Case) -> None:
    """A generated body is hardly ever an image: send a real one instead."""
    if case.media_type == "application/json" and isinstance(case.body, dict):
        case.body = {**case.body, "images": [{"b64": B64}]}
    else:
        case.body, case.media_type = PNG, "image/png"
    case.call_and_validate(checks=CHECKS)
