"""From an outcome to an answer: maps become pictures, numbers get their labels. Runs in threads."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass

import numpy as np
from msgspec import UNSET

from models.imaging.decode import DecodedImage
from models.imaging.grid import grid_png
from models.imaging.locate import Location, locate
from models.imaging.render import (
    Canvas,
    encode_values,
    heatmap_png,
    input_canvas,
    original_canvas,
    overlay,
    shade,
)
from models.imaging.style import style_of
from models.methods import METHODS
from models.types import ClassScore, Explanation, Geometry, LayerStatistics, Outcome
from service.api.plan import Plan, RenderOptions
from service.api.schemas import (
    Box,
    ExplainResult,
    ExplanationResponse,
    FeaturesResult,
    ImageData,
    ImageInfo,
    PixelRegion,
    Point,
    Prediction,
    PredictResult,
    Result,
    StatisticsResponse,
    ValueRange,
    Values,
)


@dataclass(frozen=True, slots=True)
class View:
    """What is left of a decoded picture once its job is on the way.

    Attributes:
        input: what the model saw, uint8 (H, W, 3).
        geometry: where that lies in the original.
    picture: the whole picture, kept only when it is drawn upon.
        warnings: what had to be assumed to decode it.
    """

    input: np.ndarray
    geometry: Geometry
    picture: DecodedImage | None = None
    warnings: tuple[str, ...] = ()


def render(outcome: Outcome, view: View, plan: Plan) -> Result:
    """Make one image's part of the answer."""
    labels = plan.info.labels
    image = image_info(view.geometry)
    predictions = tuple(_prediction(item, labels) for item in outcome.predictions)
    statistics = tuple(_statistics(item, plan.render) for item in outcome.statistics)
    if plan.operation == "predict":
        return PredictResult(
            image=image,
            predictions=predictions,
            statistics=statistics,
            warnings=view.warnings or UNSET,
        )
    if plan.operation == "features":
        return FeaturesResult(
            image=image,
            predictions=predictions,
            features=statistics,
            warnings=view.warnings or UNSET,
        )
    canvas = _canvas(view)
    return ExplainResult(
        image=image,
        predictions=predictions,
        explanations=tuple(
            _explanation(item, canvas=canvas, view=view, labels=labels, options=plan.render)
            for item in outcome.explanations
        ),
        statistics=statistics,
        warnings=view.warnings or UNSET,
    )


def image_info(geometry: Geometry) -> ImageInfo:
    """Size of the picture and the part of it that the model saw."""
    region = geometry.region
    return ImageInfo(
        width=geometry.width,
        height=geometry.height,
        region=PixelRegion(x=region.x, y=region.y, width=region.width, height=region.height),
    )


def _canvas(view: View) -> Canvas:
    if view.picture is None:
        return input_canvas(view.input)
    return original_canvas(view.picture, view.geometry)


def _explanation(
    item: Explanation,
    *,
    canvas: Canvas,
    view: View,
    labels: tuple[str, ...],
    options: RenderOptions,
) -> ExplanationResponse:
    location = None
    if not item.degenerate:
        location = locate(item.map, view.geometry, signed=item.signed)
    style = style_of(
        signed=item.signed,
        of_pixels=METHODS[item.method].family == "pixels",
        colormap=options.colormap,
        clip=options.clip,
    )
    unit = None if item.degenerate else shade(item.map, canvas, style)
    heatmap: ImageData | None = None
    laid_over: ImageData | None = None
    if "heatmap" in options.outputs:
        data = heatmap_png(unit, canvas, style)
        heatmap = _picture(data, "image/png", canvas)
    if "overlay" in options.outputs:
        data = overlay(
            unit,
            canvas,
            style,
            alpha=options.alpha,
            image_format=options.overlay_format,
        )
        laid_over = _picture(data, f"image/{options.overlay_format}", canvas)
    return ExplanationResponse(
        method=item.method,
        layer=item.layer,
        target=_prediction(item.target, labels),
        heatmap=heatmap or UNSET,
        overlay=laid_over or UNSET,
        values=_values(item.map) if "values" in options.outputs else UNSET,
        range=ValueRange(min=float(item.map.min()), max=float(item.map.max())),
        signed=item.signed,
        degenerate=unit is None,
        peak=Point(x=location.x, y=location.y) if location else None,
        box=_box(location),
        faithfulness=item.faithfulness,
        warnings=item.warnings,
    )


def _prediction(item: ClassScore, labels: tuple[str, ...]) -> Prediction:
    known = 0 <= item.class_id < len(labels)
    return Prediction(
        class_id=item.class_id,
        label=labels[item.class_id] if known else f"class {item.class_id}",
        score=item.score,
        probability=item.probability,
    )


def _statistics(item: LayerStatistics, options: RenderOptions) -> StatisticsResponse:
    grid: ImageData | None = None
    if item.grid is not None and item.grid.size:
        colormap = "turbo" if options.colormap == "auto" else options.colormap
        data = grid_png(item.grid, colormap=colormap)
        width, height = struct.unpack_from(">II", data, 16)  # the PNG's own header
        grid = ImageData(media_type="image/png", width=width, height=height, data=_base64(data))
    return StatisticsResponse(
        layer=item.layer,
        kind=item.kind,
        shape=item.shape,
        mean=item.mean,
        std=item.std,
        min=item.min,
        max=item.max,
        l2=item.l2,
        sparsity=item.sparsity,
        dead_channels=item.dead_channels,
        quantiles=item.quantiles,
        top_channels=item.top_channels,
        target=UNSET if item.target is None else item.target,
        grid=grid or UNSET,
    )


def _values(values: np.ndarray) -> Values:
    shape, data = encode_values(values)
    return Values(shape=(shape[0], shape[1]), dtype="float32", data=_base64(data))


def _box(location: Location | None) -> Box | None:
    if location is None:
        return None
    box = location.box
    return Box(x=box.x, y=box.y, width=box.width, height=box.height)


def _picture(data: bytes, media_type: str, canvas: Canvas) -> ImageData:
    height, width = canvas.base.shape[:2]
    return ImageData(media_type=media_type, width=width, height=height, data=_base64(data))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
