"""`/v1/models…` and `/v1/methods`: the models and methods that requests may name."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from models.errors import UnknownModel
from models.methods import METHODS
from models.methods.table import Method
from models.types import LayerInfo, ModelCard, ModelInfo
from service.api.dependencies import Service, ServiceDep
from service.api.handler import json_response
from service.api.openapi import MODEL, array_of, responses
from service.api.plan import find_model
from service.api.schemas import CardResponse, InputResponse, ModelsResponse, derive
from service.api.security import access_of

router = APIRouter(prefix="/v1", tags=["models"], default_response_class=Response)

_CARD = responses(CardResponse, "The card; `ready` says whether it serves requests.", errors=MODEL)
_LABELS = responses(
    {"type": "array", "items": {"type": "string"}}, "Labels by class index.", errors=MODEL
)
_LAYERS = responses(array_of(LayerInfo), "Layers in the model's order.", errors=MODEL)


@router.get(
    "/models", summary="List the models", responses=responses(ModelsResponse, "Names and cards.")
)
async def list_models(request: Request, service: ServiceDep) -> Response:
    """Every configured model with its card; `models` is KServe's list of names."""
    infos = service.pool.models()
    caused = _is_admin(request, service)
    return json_response(
        ModelsResponse(
            models=tuple(dict.fromkeys(info.card.name for info in infos)),
            default=service.settings.default_model,
            cards=tuple(_card(info.card, caused=caused) for info in infos),
        )
    )


@router.get("/models/{name}", summary="Show a model's card", responses=_CARD)
async def show_model(name: str, request: Request, service: ServiceDep) -> Response:
    """The card of `name` (its newest ready version) or `name@version`."""
    caused = _is_admin(request, service)
    return json_response(_card(_info(name, service).card, caused=caused))


@router.get("/models/{name}/labels", summary="List a model's labels", responses=_LABELS)
async def list_labels(name: str, service: ServiceDep) -> Response:
    """Class names in the order of their indices."""
    return json_response(_info(name, service).labels)


@router.get("/models/{name}/layers", summary="List a model's layers", responses=_LAYERS)
async def list_layers(name: str, service: ServiceDep) -> Response:
    """Every module that can be explained or described."""
    return json_response(_info(name, service).layers)


@router.get(
    "/methods",
    summary="List the explanation methods",
    responses=responses(array_of(Method), "Methods."),
)
async def list_methods() -> Response:
    """Every method, with its paper and formula; a model's card says which apply to it."""
    return json_response(list(METHODS.values()))


def _is_admin(request: Request, service: Service) -> bool:
    """Whether a request may see what caused a failed load."""
    return access_of(request, service) == "admin"


def _card(card: ModelCard, *, caused: bool) -> CardResponse:
    shown: InputResponse | None = None
    if card.input is not None:
        height, width = card.input.crop
        shown = derive(InputResponse, card.input, height=height, width=width)
    cause = card.cause if caused and card.cause else UNSET
    return derive(CardResponse, card, input=shown, cause=cause)


def _info(name: str, service: Service) -> ModelInfo:
    try:
        return find_model(name, service.pool.models(), service.settings)
    except UnknownModel as error:
        # Without a field: the path is not an option.
        raise UnknownModel(error.message) from None
