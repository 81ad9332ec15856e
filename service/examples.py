"""Answers as OpenAPI shows them; built from the answers' own types, so that they stay true."""

from __future__ import annotations

from typing import Any

import msgspec

from models.types import ChannelStatistics, Faithfulness, Quantiles
from service.schemas import (
    Box,
    ErrorAnswer,
    ExplainAnswer,
    ExplainResult,
    ExplanationAnswer,
    FeaturesAnswer,
    FeaturesResult,
    ImageInfo,
    ModelUsed,
    PictureData,
    PixelRegion,
    Point,
    PredictAnswer,
    Prediction,
    PredictResult,
    StatisticsAnswer,
    Timings,
    ValueRange,
)

_REQUEST_ID = "01JZ8Q4M7V9WK3T5R2XN6B1C0D"
_MODEL = ModelUsed(name="efficientnet_lite0", version="1", device="cpu", precision="fp32")
_IMAGE = ImageInfo(
    width=500, height=375, region=PixelRegion(x=85.9, y=23.4, width=328.1, height=328.1)
)
_TABBY = Prediction(class_id=281, label="tabby", score=9.21, probability=0.61)
_TIMINGS = Timings(decode=2.1, queue=0.4, device=21.7, render=1.2, total=26.0)
_STATISTICS = StatisticsAnswer(
    layer="bn2",
    kind="output",
    shape=(1280, 7, 7),
    mean=0.31,
    std=0.6,
    min=0.0,
    max=6.0,
    l2=12.4,
    sparsity=0.62,
    dead_channels=12,
    quantiles=Quantiles(p01=0.0, p25=0.0, p50=0.0, p75=0.4, p99=3.2),
    top_channels=(ChannelStatistics(index=711, mean=4.2, max=6.0, weight=0.031),),
)
_EXPLANATION = ExplanationAnswer(
    method="gradcam",
    layer="bn2",
    target=_TABBY,
    heatmap=PictureData(media_type="image/png", width=224, height=224, data="iVBORw0KGgo="),
    overlay=PictureData(media_type="image/jpeg", width=224, height=224, data="/9j/4AAQSkY="),
    range=ValueRange(min=0.0, max=3.7),
    signed=False,
    degenerate=False,
    peak=Point(x=241.0, y=180.5),
    box=Box(x=120, y=60, width=260, height=290),
    faithfulness={"deletion": Faithfulness(value=0.11, random=0.32)},
)


def _builtins(answer: msgspec.Struct) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(answer)
    return built


PREDICT = _builtins(
    PredictAnswer(
        request_id=_REQUEST_ID,
        model=_MODEL,
        results=(PredictResult(image=_IMAGE, predictions=(_TABBY,), statistics=()),),
        timings_ms=_TIMINGS,
        batch_size=4,
    )
)
EXPLAIN = _builtins(
    ExplainAnswer(
        request_id=_REQUEST_ID,
        model=_MODEL,
        results=(
            ExplainResult(
                image=_IMAGE,
                predictions=(_TABBY,),
                explanations=(_EXPLANATION,),
                statistics=(_STATISTICS,),
            ),
        ),
        timings_ms=_TIMINGS,
        batch_size=4,
    )
)
FEATURES = _builtins(
    FeaturesAnswer(
        request_id=_REQUEST_ID,
        model=_MODEL,
        results=(FeaturesResult(image=_IMAGE, predictions=(_TABBY,), features=(_STATISTICS,)),),
        timings_ms=_TIMINGS,
        batch_size=4,
    )
)
ERROR = _builtins(
    ErrorAnswer(
        error="Unknown method. Allowed: gradcam, layercam.",
        code="invalid_option",
        request_id=_REQUEST_ID,
        retryable=False,
        field="methods.0",
    )
)
EXPLAIN_REQUEST: dict[str, Any] = {
    "images": [{"b64": "iVBORw0KGgo=", "targets": ["tabby"]}],
    "methods": ["gradcam", "layercam"],
    "targets": ["top1", {"class": 281, "against": [282, "top2"]}],
}
