"""Requests that the OpenAPI document allows get a documented response, and never a fault."""

from __future__ import annotations

import base64
import io
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from PIL import Image
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


def make_schema() -> Any:
    pool = FakePool()
    app = create_app(Settings(limits={"max_images": 4}), pool)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


schema = make_schema()
options_schema = make_schema()
options_schema.config.phases.coverage.enabled = False


# Paths with a version, and PUT, are second names of the same routes.
@schema.exclude(path_regex="{version}").exclude(method="PUT").parametrize()
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
def test_documented_requests(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)


@options_schema.include(path_regex="^/v1/(predict|explain|features)$").parametrize()
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
def test_documented_options_of_a_real_image(case: schemathesis.Case) -> None:
    """A generated body is hardly ever an image: send a real one instead."""
    if case.media_type == "application/json" and isinstance(case.body, dict):
        case.body = {**case.body, "images": [{"b64": B64}]}
    else:
        case.body, case.media_type = PNG, "image/png"
    case.call_and_validate(checks=CHECKS)
