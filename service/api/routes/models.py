"""`/v1/models…` and `/v1/methods`: what can be asked."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Response

from models.errors import UnknownModel
from models.methods import METHODS
from models.types import ModelCard, ModelInfo, Preprocess
from service.api.dependencies import Service, ServiceDep
from service.api.handler import json_response
from service.api.openapi import answers, model_responses, ref
from service.api.plan import find_model
from service.api.schemas import CardResponse, InputResponse, MethodResponse, ModelsResponse

router = APIRouter(prefix="/v1", tags=["models"])


@router.get(
    "/models",
    summary="List the models",
    response_class=Response,
    responses=answers(ref("ModelsResponse"), "Names and cards."),
)
async def list_models(service: ServiceDep) -> Response:
    """Every configured model with its card; `models` is KServe's list of names."""
    infos = service.pool.models()
    return json_response(
        ModelsResponse(
            models=tuple(dict.fromkeys(info.card.name for info in infos)),
            default=service.settings.default_model,
            cards=tuple(card_answer(info.card, infos) for info in infos),
        )
    )


@router.get(
    "/models/{name}",
    summary="Show a model's card",
    response_class=Response,
    responses=model_responses(ref("CardResponse"), "The card; `ready` says whether it answers."),
)
async def show_model(name: str, service: ServiceDep) -> Response:
    """The card of `name` (its newest ready version) or `name@version`."""
    return json_response(card_answer(_info(name, service).card, service.pool.models()))


@router.get(
    "/models/{name}/labels",
    summary="List a model's labels",
    response_class=Response,
    responses=model_responses(
        {"type": "array", "items": {"type": "string"}}, "Labels by class index."
    ),
)
async def list_labels(name: str, service: ServiceDep) -> Response:
    """Class names in the order of their indices."""
    return json_response(_info(name, service).labels)


@router.get(
    "/models/{name}/layers",
    summary="List a model's layers",
    response_class=Response,
    responses=model_responses(
        {"type": "array", "items": ref("LayerInfo")}, "Layers in the model's order."
    ),
)
async def list_layers(name: str, service: ServiceDep) -> Response:
    """Every module that can be explained or described."""
    return json_response(_info(name, service).layers)


@router.get(
    "/methods",
    summary="List the explanation methods",
    response_class=Response,
    responses=answers({"type": "array", "items": ref("MethodResponse")}, "Methods."),
)
async def list_methods() -> Response:
    """Every method, with its paper and formula; a model's card says which apply to it."""
    return json_response(
        [
            MethodResponse(
                name=row.name,
                title=row.title,
                paper=row.paper,
                formula=row.formula,
                family=row.family,
                needs_gradients=row.needs_gradients,
                signed=row.signed,
                cost=row.cost,
                defaults=row.defaults,
            )
            for row in METHODS.values()
        ]
    )


def card_answer(card: ModelCard, infos: Sequence[ModelInfo]) -> CardResponse:
    """A card as the API shows it."""
    return CardResponse(
        name=card.name,
        version=card.version,
        ready=card.ready,
        state=card.state,
        reason=card.reason,
        versions=tuple(info.card.version for info in infos if info.card.name == card.name),
        devices=card.devices,
        source=card.source,
        num_classes=card.num_classes,
        task=card.task,
        input=_input(card.input),
        target_layer=card.target_layer,
        head=card.head,
        closed_form=card.closed_form,
        methods=card.methods,
        precision=card.precision,
        preparation=card.preparation,
        notes=card.notes,
        best_batch=card.best_batch,
        latency_ms={str(batch): ms for batch, ms in card.latency_ms.items()},
    )


def _input(spec: Preprocess | None) -> InputResponse | None:
    if spec is None:
        return None
    height, width = spec.crop
    return InputResponse(
        height=height,
        width=width,
        resize=spec.resize,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
    )


def _info(name: str, service: Service) -> ModelInfo:
    try:
        return find_model(name, service.pool.models(), service.settings)
    except UnknownModel as error:
        raise UnknownModel(error.message) from None  # the path is no option: no field to blame
