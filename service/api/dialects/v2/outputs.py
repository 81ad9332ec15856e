"""The outputs of a model: what each is called, and how it is made from results."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import numpy as np

from models.errors import InvalidOption
from models.types import ModelCard, Struct
from service.api.dialects.v2.tensors import Tensor
from service.api.options import Output
from service.api.schemas import ExplanationResponse, Prediction, Result

Values = np.ndarray | list[bytes]
Make = Callable[[Sequence[Any], int], tuple[tuple[int, ...], Values]]
"""Makes an output's shape and values from results and the number of classes."""


class OutputKind(Struct):
    """One output.

    Attributes:
        dims: sizes without the batch; -1 where they vary, 0 for the number of classes.
        make: makes it.
        needs: what the native API calls that which it is made from; None = nothing is drawn for it.
        of_all_classes: whether it is made from all predictions rather than from the best ones.
        of_text: whether its elements are text.
    """

    datatype: Literal["FP32", "BYTES"]
    dims: tuple[int, ...]
    make: Make
    needs: Output | None = None
    of_all_classes: bool = False
    of_text: bool = True

    def sizes(self, card: ModelCard) -> tuple[int, ...]:
        """The sizes without the batch for one model."""
        return tuple(size or card.num_classes for size in self.dims)


def _classes(field: Literal["score", "probability"]) -> Make:
    def make(results: Sequence[Any], classes: int) -> tuple[tuple[int, ...], Values]:
        values = np.zeros((len(results), classes), "<f4")
        for row, result in zip(values, results, strict=True):
            for prediction in result.predictions:
                row[prediction.class_id] = getattr(prediction, field)
        return values.shape, values

    return make


def _labels(results: Sequence[Any], _: int) -> tuple[tuple[int, ...], Values]:
    rows: list[tuple[Prediction, ...]] = [result.predictions for result in results]
    return (len(rows), len(rows[0])), [p.label.encode() for row in rows for p in row]


def _heatmaps(results: Sequence[Any], _: int) -> tuple[tuple[int, ...], Values]:
    maps = [e.values for result in results for e in result.explanations]
    shape = maps[0].shape
    if any(item.shape != shape for item in maps):
        reason = "Maps of different sizes are not one tensor: ask for one layer, or fuse them."
        raise InvalidOption(reason, field="layers")
    values = np.frombuffer(b"".join(base64.b64decode(item.data) for item in maps), "<f4")
    return (*_rows(results), *shape), values


def _files(field: Literal["heatmap", "overlay"]) -> Make:
    def make(results: Sequence[Any], _: int) -> tuple[tuple[int, ...], Values]:
        found = [getattr(e, field).data for result in results for e in result.explanations]
        return _rows(results), [base64.b64decode(data) for data in found]

    return make


def _documents(results: Sequence[Any], _: int) -> tuple[tuple[int, ...], Values]:
    return (len(results),), [msgspec.json.encode(result) for result in results]


def _rows(results: Sequence[Any]) -> tuple[int, ...]:
    """Images, and their explanations where each has more than one."""
    first: tuple[ExplanationResponse, ...] = results[0].explanations
    return (len(results),) if len(first) == 1 else (len(results), len(first))


PREDICT: Mapping[str, OutputKind] = MappingProxyType(
    {
        "scores": OutputKind(
            datatype="FP32", dims=(0,), make=_classes("score"), of_all_classes=True
        ),
        "probabilities": OutputKind(
            datatype="FP32", dims=(0,), make=_classes("probability"), of_all_classes=True
        ),
        "labels": OutputKind(datatype="BYTES", dims=(-1,), make=_labels),
        "result": OutputKind(datatype="BYTES", dims=(), make=_documents),
    }
)
"""Outputs of a prediction by name; `result` is the native API's result as JSON."""

EXPLAIN: Mapping[str, OutputKind] = MappingProxyType(
    {
        **PREDICT,
        "heatmap": OutputKind(datatype="FP32", dims=(-1, -1), make=_heatmaps, needs="values"),
        "heatmap_png": OutputKind(
            datatype="BYTES", dims=(), make=_files("heatmap"), needs="heatmap", of_text=False
        ),
        "overlay": OutputKind(
            datatype="BYTES", dims=(), make=_files("overlay"), needs="overlay", of_text=False
        ),
    }
)
"""Outputs of an explanation by name."""


def make_output(name: str, results: Sequence[Result], *, classes: int) -> Tensor:
    """Make an output from the results of a request's images.

    Raises:
        InvalidOption: the results do not fit into one tensor.
    """
    kind = EXPLAIN[name]
    shape, values = kind.make(results, classes)
    return Tensor(
        name=name, datatype=kind.datatype, shape=shape, values=values, of_text=kind.of_text
    )


def classification(tensor: Tensor, labels: Sequence[str], *, count: int) -> Tensor:
    """The best classes of an output instead of all, each as `value:index:label`."""
    assert isinstance(tensor.values, np.ndarray)
    best = np.argsort(-tensor.values, axis=1, kind="stable")[:, :count]
    elements = [
        f"{row[i]:f}:{i}:{labels[i] if i < len(labels) else ''}".encode()
        for row, indices in zip(tensor.values, best, strict=True)
        for i in indices
    ]
    return Tensor(name=tensor.name, datatype="BYTES", shape=best.shape, values=elements)
