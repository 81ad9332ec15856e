"""Replies as HTTP answers."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Response

from models.types import ModelInfo
from service.pipeline import Reply
from service.schemas import ModelUsed


def json_response(answer: Any, *, status: int = 200) -> Response:
    """Encode an answer of `service.schemas`, or a list of them, in one step."""
    return Response(msgspec.json.encode(answer), status_code=status, media_type="application/json")


def model_used(info: ModelInfo, reply: Reply) -> ModelUsed:
    """The model that made a reply, as every answer names it."""
    card = info.card
    return ModelUsed(
        name=card.name,
        version=card.version,
        device=reply.device,
        precision=card.precision,
    )
