"""Loading and unloading models while the service runs: Triton's model repository extension."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from models.catalog import ModelSpec
from models.errors import BodyTooLarge, InternalError, InvalidOption, UnknownModel
from models.types import ModelCard
from service.api.body import JSON
from service.api.dependencies import Service, ServiceDep
from service.api.handler import json_response
from service.api.json import json_object
from service.api.openapi import ADMIN, array_of, responses
from service.api.plan import names
from service.api.schemas import RepositoryModel, derive
from service.configuration import ConfigurationError

log = logging.getLogger("heatlens.models")

router = APIRouter(prefix="/v2/repository", tags=["admin"], default_response_class=Response)

_MAX_BYTES = 64_000
_INDEX = responses(array_of(RepositoryModel), "Model versions.", errors=ADMIN)
_DONE = responses({"type": "object"}, "Done; the body is an empty object.", errors=ADMIN)


def _optional_body(**fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of these routes; `fields` are their own, in addition to `parameters`."""
    schema = {"type": "object", "properties": {"parameters": {"type": "object"}, **fields}}
    return {"requestBody": {"required": False, "content": {JSON: {"schema": schema}}}}


@router.post(
    "/index",
    summary="List the models of the repository",
    responses=_INDEX,
    openapi_extra=_optional_body(ready={"type": "boolean"}),
)
async def index(request: Request, service: ServiceDep) -> Response:
    """Every model version that is loaded or configured; with `{"ready": true}`, the ready ones."""
    only_ready = (await _body(request)).get("ready", False)
    if not isinstance(only_ready, bool):
        raise InvalidOption("Must be true or false.", field="ready")
    listed = [_listed(info.card) for info in service.pool.models()]
    known = {(model.name, model.version) for model in listed}
    listed += [
        RepositoryModel(
            name=spec.name, version=spec.version, state="UNAVAILABLE", reason="not loaded"
        )
        for spec in await _configured(service)
        if spec.key not in known
    ]
    return json_response([m for m in listed if m.state == "READY" or not only_ready])


@router.post(
    "/models/{model}/load",
    summary="Load a model, or load it again",
    responses=_DONE,
    openapi_extra=_optional_body(),
)
async def load(model: str, request: Request, service: ServiceDep) -> Response:
    """Load `name` (every configured version) or `name@version` from the current configuration file.

    A loaded version is replaced once the new one is warm; each request is answered entirely by the
    one or the other. Models come only from the configuration file: a configuration or files in
    `parameters` are refused.
    """
    await _refuse_files(request)
    specs = [spec for spec in await _configured(service) if names(model, spec)]
    if not specs:
        raise UnknownModel("The configuration has no such model.")
    for spec in specs:
        await service.pool.load(spec)
        log.info("model %s was loaded by request", spec.full_name)
    return json_response({})


@router.post(
    "/models/{model}/unload",
    summary="Unload a model",
    responses=_DONE,
    openapi_extra=_optional_body(),
)
async def unload(model: str, request: Request, service: ServiceDep) -> Response:
    """Let `name` (every version) or `name@version` finish its jobs, then drop it.

    It stays unloaded until it is loaded again, the configuration is reloaded or the service is
    restarted.
    """
    await _refuse_files(request)
    name, _, version = model.partition("@")
    try:
        await service.pool.unload(name, version or None)
    except UnknownModel as error:
        # Without a field: the path is not an option.
        raise UnknownModel(error.message) from None
    log.info("model %s was unloaded by request", model)
    return json_response({})


def _listed(card: ModelCard) -> RepositoryModel:
    reason = "" if card.state == "ready" else _why(card)
    return derive(RepositoryModel, card, state=card.state.upper(), reason=reason)


def _why(card: ModelCard) -> str:
    """The reason, and what caused it: only the operator reads this list."""
    reason = card.reason or ""
    return f"{reason} Cause: {card.cause}" if card.cause else reason


async def _configured(service: Service) -> list[ModelSpec]:
    """The models of the current configuration.

    Raises:
        InternalError: the configuration has become invalid.
    """
    try:
        return (await asyncio.to_thread(service.read_settings)).models
    except ConfigurationError as error:
        log.error("the configuration is wrong: %s", error)  # noqa: TRY400 # no trace needed
        raise InternalError("The configuration is invalid; see the service's log.") from None


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; an empty body is an empty object, whatever its content type.

    Raises:
        BodyTooLarge: it exceeds a fixed cap.
        MalformedBody: it is not a JSON object.
    """
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > _MAX_BYTES:
            raise BodyTooLarge("The body of an administrative request has at most 64,000 bytes.")
    return json_object(content) if content.strip() else {}


async def _refuse_files(request: Request) -> None:
    """Refuse parameters that would decide what is loaded, such as a configuration or a file.

    Raises:
        InvalidOption: there is one.
    """
    parameters = (await _body(request)).get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise InvalidOption("Must be an object.", field="parameters")
    # Triton's clients send `unload_dependents`; here models do not depend on each other.
    if parameters.keys() - {"unload_dependents"}:
        raise InvalidOption(
            "Models are loaded only as the configuration file describes them.", field="parameters"
        )
