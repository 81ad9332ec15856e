"""`/`: the web page for browsers, name and version for other clients; `/page/…`: the page's files."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.staticfiles import StaticFiles

import service
from models.imaging.colormaps import COLORMAPS
from service.api.handler import json_response
from service.api.openapi import OPEN, responses
from service.api.schemas import AliveResponse

router = APIRouter(tags=["health"], default_response_class=Response)

_FOLDER = Path(service.__file__).parent / "web"
_FILES = StaticFiles(directory=_FOLDER)
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Permissions-Policy": "camera=(self)",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Kept, but asked for each time: the files of a new version are used at once.
    "Cache-Control": "no-cache",
}
_ALIVE = responses(AliveResponse, "The process is alive.", errors=OPEN)
_ALIVE[200]["content"]["text/html"] = {"schema": {"type": "string"}}


@router.get("/", summary="The web page, or name and version", responses=_ALIVE)
async def index(request: Request) -> Response:
    """The web page for `Accept: text/html`, otherwise name and version (KServe's liveness call)."""
    if "text/html" in request.headers.get("accept", "").lower():
        response = await page_file("index.html", request)
    else:
        response = json_response(AliveResponse(status="alive", version=request.app.version))
    response.headers["Vary"] = "Accept"
    return response


@router.get("/page/colormaps.json", include_in_schema=False)
async def colormaps() -> Response:
    """The colour tables that heatmaps are drawn with: base64 of 256 RGB levels, by name."""
    tables = {name: base64.b64encode(table.tobytes()).decode() for name, table in COLORMAPS.items()}
    content = msgspec.json.encode(tables)
    return Response(content, headers=_HEADERS, media_type="application/json")


@router.get("/page/{path:path}", include_in_schema=False)
async def page_file(path: str, request: Request) -> Response:
    """One file of the page."""
    response = await _FILES.get_response(path, request.scope)
    response.headers.update(_HEADERS)
    return response
