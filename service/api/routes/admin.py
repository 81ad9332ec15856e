"""Loading and unloading models while the service runs: Triton's model repository extension."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from models.catalog import ModelSpec
from models.errors import BodyTooLarge, InternalError, InvalidOption, MalformedBody, UnknownModel
from models.types import ModelCard, ModelState
from service.api.dependencies import Service, ServiceDep
from service.api.handler import json_response
from service.api.openapi import admin_responses, ref, repository_body
from service.api.schemas import RepositoryModel
from service.settings import ConfigurationError

log = logging.getLogger("heatlens.models")

router = APIRouter(prefix="/v2/repository", tags=["admin"])

_MOST_BYTES = 64_000
_STATES: Mapping[ModelState, str] = {
    "loading": "LOADING",
    "ready": "READY",
    "unavailable": "UNAVAILABLE",
    "unloading": "UNLOADING",
}
_DONE = admin_responses({"type": "object"}, "Done; the body is an empty object.")


@router.post(
    "/index",
    summary="List what is, or could be, loaded",
    response_class=Response,
    responses=admin_responses(
        {"type": "array", "items": ref("RepositoryModel")}, "Model versions."
    ),
    openapi_extra=repository_body(ready={"type": "boolean"}),
)
async def index(request: Request, service: ServiceDep) -> Response:
    """Every model version that is loaded or configured; with `{"ready": true}` only those that answer requests."""
    body = await _body(request)
    only_ready = body.get("ready", False)
    if not isinstance(only_ready, bool):
        raise InvalidOption("Must be true or false.", field="ready")
    listed = [_listed(info.card) for info in service.pool.models()]
    known = {(model.name, model.version) for model in listed}
    listed += [
        RepositoryModel(
            name=spec.name, version=spec.version, state="UNAVAILABLE", reason="not loaded"
        )
        for spec in await _configured(service)
        if (spec.name, spec.version) not in known
    ]
    return json_response([m for m in listed if m.state == "READY" or not only_ready])


@router.post(
    "/models/{model}/load",
    summary="Load a model, or load it again",
    response_class=Response,
    responses=_DONE,
    openapi_extra=repository_body(),
)
async def load(model: str, request: Request, service: ServiceDep) -> Response:
    """Load `name` (every configured version of it) or `name@version`, as the configuration file says now.

    A version that is loaded is replaced once the new one is warm; requests are answered by the one
    or the other, whole. Models come from the configuration only: a configuration or files in
    `parameters` are refused.
    """
    _refuse_files(await _body(request))
    name, _, version = model.partition("@")
    specs = [
        spec
        for spec in await _configured(service)
        if spec.name == name and (not version or spec.version == version)
    ]
    if not specs:
        raise UnknownModel("The configuration has no such model.")
    for spec in specs:
        await service.pool.load(spec)
        log.info("model %s@%s was loaded by request", spec.name, spec.version)
    return json_response({})


@router.post(
    "/models/{model}/unload",
    summary="Unload a model",
    response_class=Response,
    responses=_DONE,
    openapi_extra=repository_body(),
)
async def unload(model: str, request: Request, service: ServiceDep) -> Response:
    """Let `name` (every version of it) or `name@version` finish its jobs, then drop it.

    It stays unloaded until it is loaded again, the configuration is reloaded or the service is
    started again.
    """
    _refuse_files(await _body(request))
    name, _, version = model.partition("@")
    try:
        await service.pool.unload(name, version or None)
    except UnknownModel as error:
        raise UnknownModel(error.message) from None  # the path is no option: no field to blame
    log.info("model %s was unloaded by request", model)
    return json_response({})


def _listed(card: ModelCard) -> RepositoryModel:
    return RepositoryModel(
        name=card.name,
        version=card.version,
        state=_STATES[card.state],
        reason="" if card.state == "ready" else _why(card),
    )


def _why(card: ModelCard) -> str:
    """The reason, and what caused it: only the operator reads this list."""
    reason = card.reason or ""
    return f"{reason} Cause: {card.cause}" if card.cause else reason


async def _configured(service: Service) -> list[ModelSpec]:
    """The catalog as the configuration has it now.

    Raises:
        InternalError: the configuration is wrong now.
    """
    try:
        return (await asyncio.to_thread(service.read_settings)).models
    except ConfigurationError as error:
        log.error("the configuration is wrong: %s", error)  # noqa: TRY400 # no trace needed
        raise InternalError("The configuration is wrong; the service's log says where.") from None


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; an empty body is an empty object, whatever its content type.

    Raises:
        BodyTooLarge: it is far longer than it could need to be.
        MalformedBody: it is no JSON object.
    """
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > _MOST_BYTES:
            raise BodyTooLarge("The body of an administrative request is small.")
    if not content.strip():
        return {}
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise MalformedBody("The body is no JSON object.") from None


def _refuse_files(body: Mapping[str, Any]) -> None:
    """Take nothing from the request that decides what is loaded.

    Raises:
        InvalidOption: it names a configuration or brings files.
    """
    parameters = body.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise InvalidOption("Must be an object.", field="parameters")
    for name in parameters:
        if (
            name != "unload_dependents"
        ):  # Triton's clients send it; no model here depends on another
            raise InvalidOption(
                "Models are loaded as the configuration file names them, and in no other way.",
                field="parameters",
            )
