"""That all servers answer the same question: five classes and a PNG picture, and the same first class."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image

PICTURE_SIDE = 224


class NotComparable(RuntimeError):
    """A server answers something else; its numbers would mean nothing."""


def first_class(body: bytes) -> int:
    """The most probable class of an answer of any of the servers, after a look at all of it.

    Raises:
        NotComparable: not five classes in order, or no picture of the model's crop.
    """
    answer = json.loads(body)
    result = answer["results"][0] if "results" in answer else answer
    predictions = result["predictions"]
    probabilities = [row["probability"] for row in predictions]
    if len(predictions) != 5 or probabilities != sorted(probabilities, reverse=True):
        raise NotComparable(f"There are {len(predictions)} predictions, {probabilities}.")
    size = _picture(result).size
    if size != (PICTURE_SIDE, PICTURE_SIDE):
        raise NotComparable(f"The heatmap has {size} pixels.")
    class_id: int = predictions[0]["class_id"]
    return class_id


def _picture(result: dict[str, Any]) -> Image.Image:
    if "explanations" in result:
        (explanation,) = result["explanations"]
        data = explanation.get("heatmap", explanation.get("overlay"))["data"]
    else:
        data = result["heatmap"]
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    picture.load()
    return picture
