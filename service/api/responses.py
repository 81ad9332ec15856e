"""Turns outcomes into responses: draws the maps and labels the classes. Runs in threads."""

from __future__ import annotations

import base64
import struct
from collections.abc import Generator
from typing import Any, TypeVar

import numpy as np
from msgspec import UNSET, UnsetType, structs

from models.imaging.grid import grid_png
from models.imaging.locate import locate
from models.imaging.prepare import PreparedImage
from models.imaging.render import (
    Canvas,
    encode_values,
    heatmap_png,
    input_canvas,
    original_canvas,
    overlay,
    quantise,
    shade,
)
from models.imaging.style import style_of
from models.methods import METHODS
from models.types import ClassScore, Explanation, LayerFeatures, Outcome
from service.api import schemas
from service.api.plan import Plan
from service.api.schemas import ImageData, Prediction, Result, StatisticsResponse, derive

MapT = TypeVar("MapT", schemas.MapResponse, schemas.ExplanationResponse)


def render(outcome: Outcome, source: PreparedImage, plan: Plan) -> Generator[int, None, Result]:
    """Make the result of one image; yields the number of bytes after each part that was drawn."""
    labels = plan.info.labels
    image = derive(schemas.ImageInfo, source.geometry)
    predictions = tuple(_prediction(item, labels) for item in outcome.predictions)
    described: list[StatisticsResponse] = []
    for item in outcome.statistics:
        described.append(_statistics(item, plan))
        yield _size(described[-1].grid)
    statistics = tuple(described)
    warnings = source.warnings or UNSET
    if plan.operation == "predict":
        return schemas.PredictResult(
            image=image, predictions=predictions, statistics=statistics, warnings=warnings
        )
    if plan.operation == "features":
        return schemas.FeaturesResult(
            image=image, predictions=predictions, features=statistics, warnings=warnings
        )
    canvas = _canvas(source)
    if plan.operation == "compare":
        maps: list[schemas.MapResponse] = []
        for explanation in outcome.explanations:
            maps.append(_map(schemas.MapResponse, explanation, canvas, source, plan))
            yield _size(maps[-1].heatmap) + _size(maps[-1].overlay)
        return schemas.CompareResult(image=image, explanations=tuple(maps), warnings=warnings)
    explanations: list[schemas.ExplanationResponse] = []
    for explanation in outcome.explanations:
        explanations.append(_explanation(explanation, canvas, source, plan))
        yield _size(explanations[-1].heatmap) + _size(explanations[-1].overlay)
    return schemas.ExplainResult(
        image=image,
        predictions=predictions,
        explanations=tuple(explanations),
        statistics=statistics,
        warnings=warnings,
    )


def draw(item: Explanation, source: PreparedImage, plan: Plan) -> schemas.ExplanationResponse:
    """Make one explanation of an image."""
    return _explanation(item, _canvas(source), source, plan)


def _canvas(source: PreparedImage) -> Canvas:
    if source.original is not None:
        return original_canvas(source.original, source.geometry)
    picture = source.input if source.picture is None else source.picture
    if picture.dtype != np.uint8:
        # Nothing to draw on: a heatmap takes only the size.
        picture = np.zeros((*picture.shape[1:], 3), np.uint8)
    return input_canvas(picture)


def _explanation(
    item: Explanation, canvas: Canvas, source: PreparedImage, plan: Plan
) -> schemas.ExplanationResponse:
    area, class_id = _place(item.target.class_id, plan)
    target = structs.replace(item.target, class_id=class_id)
    return _map(
        schemas.ExplanationResponse,
        item,
        canvas,
        source,
        plan,
        target=_prediction(target, plan.info.labels),
        area=area,
    )


def _map(
    kind: type[MapT],
    item: Explanation,
    canvas: Canvas,
    source: PreparedImage,
    plan: Plan,
    **fields: Any,
) -> MapT:
    """Draw a map, as a response of some kind that has these fields, too."""
    options = plan.render
    style = style_of(
        signed=item.signed,
        of_pixels=METHODS[item.method].family == "pixels",
        colormap=options.colormap,
        clip=options.clip,
    )
    location = unit = None
    if not item.degenerate:
        unit = shade(item.map, canvas, style)
        # What is drawn on all of the model's input is what is located.
        is_same = source.original is None and not style.clip
        location = locate(
            item.map, source.geometry, signed=item.signed, unit=unit if is_same else None
        )
    levels = quantise(unit)
    heatmap: ImageData | UnsetType = UNSET
    overlaid: ImageData | UnsetType = UNSET
    if "heatmap" in options.outputs:
        data = heatmap_png(levels, canvas, style)
        heatmap = _image_data(data, "image/png", canvas)
    if "overlay" in options.outputs:
        data = overlay(
            levels,
            canvas,
            style,
            alpha=options.alpha,
            image_format=options.overlay_format,
        )
        overlaid = _image_data(data, f"image/{options.overlay_format}", canvas)
    return derive(
        kind,
        item,
        **fields,
        heatmap=heatmap,
        overlay=overlaid,
        values=_values(item.map) if "values" in options.outputs else UNSET,
        range=schemas.ValueRange(min=float(item.map.min()), max=float(item.map.max())),
        degenerate=unit is None,
        peak=derive(schemas.Point, location) if location else None,
        box=location.box if location else None,
    )


def _place(column: int, plan: Plan) -> tuple[int | UnsetType, int]:
    """The number of a target's area, from 0, if it has one, and its class."""
    area, class_id = divmod(column, max(1, plan.info.card.num_classes))
    return (area - 1 if area else UNSET), class_id


def _prediction(item: ClassScore, labels: tuple[str, ...]) -> Prediction:
    known = 0 <= item.class_id < len(labels)
    label = labels[item.class_id] if known else f"class {item.class_id}"
    # Field by field: dialects ask for all classes of a model.
    return Prediction(
        class_id=item.class_id, score=item.score, probability=item.probability, label=label
    )


def _statistics(item: LayerFeatures, plan: Plan) -> StatisticsResponse:
    options, target = plan.render, item.target
    if target is not UNSET:
        _, target = _place(target, plan)
    grid: ImageData | UnsetType = UNSET
    if item.grid is not None and item.grid.size:
        colormap = "turbo" if options.colormap == "auto" else options.colormap
        data = grid_png(item.grid, colormap=colormap)
        # The size in the header of the PNG.
        width, height = struct.unpack_from(">II", data, 16)
        grid = ImageData(media_type="image/png", width=width, height=height, data=_base64(data))
    return derive(StatisticsResponse, item, grid=grid, target=target)


def _values(values: np.ndarray) -> schemas.Values:
    shape, data = encode_values(values)
    return schemas.Values(shape=(shape[0], shape[1]), dtype="float32", data=_base64(data))


def _image_data(data: bytes, media_type: str, canvas: Canvas) -> ImageData:
    height, width = canvas.base.shape[:2]
    return ImageData(media_type=media_type, width=width, height=height, data=_base64(data))


def _size(picture: ImageData | UnsetType) -> int:
    return 0 if picture is UNSET else len(picture.data)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
