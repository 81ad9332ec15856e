"""`/docs`: the interactive documentation with all of its files; and `/openapi.json`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from starlette.staticfiles import StaticFiles

from service.api.security import require_operator_key

router = APIRouter(include_in_schema=False, dependencies=[Depends(require_operator_key)])

_FILES = StaticFiles(packages=[("fastapi_offline", "static")])
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}
# Addresses are relative: a proxy may put all of it under a prefix.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Heatlens API</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null,
});
"""


@router.get("/openapi.json")
async def document(request: Request) -> Response:
    """The OpenAPI document."""
    found: dict[str, Any] = request.app.openapi()
    return JSONResponse(found)


@router.get("/docs")
async def page() -> Response:
    """The page."""
    return Response(_PAGE, headers=_HEADERS, media_type="text/html")


@router.get("/docs/start.js")
async def start() -> Response:
    """The script that starts it; a policy that allows scripts in the page would allow others."""
    return Response(_START, headers=_HEADERS, media_type="text/javascript")


@router.get("/docs/{path:path}")
async def file(path: str, request: Request) -> Response:
    """One of its files."""
    response = await _FILES.get_response(path, request.scope)
    response.headers.update(_HEADERS)
    return response
