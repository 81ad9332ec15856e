"""One inference: makes images and options of its request, and its response of the results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from fastapi import Response
from msgspec import UNSET, structs

from models.errors import HeatlensError, ImageUndecodable, InvalidOption, TooManyImages
from models.imaging.decode import sniff
from models.types import Struct
from service.api.body import ImageInput, RequestBody, parse_query
from service.api.dialects.v2.outputs import EXPLAIN, PREDICT, classification, make_output
from service.api.dialects.v2.schemas import InferRequest, InferResponse, Parameters, RequestedOutput
from service.api.dialects.v2.tensors import Tensor, read_request, write_outputs
from service.api.handler import good_results
from service.api.json import decode_base64, validate
from service.api.options import ExplainOptions, Output, PredictOptions, list_options
from service.api.pipeline import Reply
from service.api.plan import Plan
from service.api.schemas import Result
from service.settings import LimitSettings

BINARY_LENGTH = "Inference-Header-Content-Length"
EXPLAIN_SUFFIX = ":explain"

# Parameters of the protocol, of its extensions and of its clients; `timeout` is read separately.
_OTHERS = frozenset(
    {"explain", "binary_data_output", "content_type", "headers", "priority", "timeout"}
)
_OTHER_PREFIXES = ("sequence_", "triton_")

_DEFAULTS: Mapping[Output, str] = {
    "values": "heatmap",
    "heatmap": "heatmap_png",
    "overlay": "overlay",
}
"""Names of outputs by what the native option `outputs` calls them."""


class Call(Struct):
    """A request that was read.

    Attributes:
        model: the model's name as it was asked for.
        body: images and options for the pipeline.
        outputs: the outputs of the response, in order.
        is_binary: whether outputs that do not say otherwise are binary.
    """

    model: str
    id: str | int | None
    body: RequestBody[Any]
    outputs: tuple[RequestedOutput, ...]
    is_binary: bool

    def adapt(self, plan: Plan) -> Plan:
        """Have the plan predict all classes if an output needs them."""
        if not any(EXPLAIN[output.name].of_all_classes for output in self.outputs):
            return plan
        classes = plan.info.card.num_classes
        images = [
            structs.replace(image, options=structs.replace(image.options, top_k=classes))
            for image in plan.images
        ]
        return structs.replace(plan, images=tuple(images))


def read_call(
    body: bytes,
    *,
    json_bytes: str | None,
    model: str,
    version: str | None,
    explains: bool,
    limits: LimitSettings,
) -> Call:
    """Read a request.

    Args:
        body: the request's body.
        json_bytes: its header `BINARY_LENGTH`.
        model: the model's name; with `EXPLAIN_SUFFIX` it is explained.
        version: the model's version; None = the newest.
        explains: whether the path asks for an explanation.
        limits: caps.

    Raises:
        HeatlensError: it is wrong; the error names the field.
    """
    request, tensor = read_request(body, json_bytes=json_bytes)
    name = model.removesuffix(EXPLAIN_SUFFIX)
    explains = explains or name != model or request.parameters.get("explain") is True
    kinds = EXPLAIN if explains else PREDICT
    _check_outputs(request.outputs or (), kinds)
    kind = ExplainOptions if explains else PredictOptions
    values = _option_values(request.parameters, kind)
    values["model"] = name if version is None else f"{name}@{version}"
    outputs = request.outputs or _default_outputs(values, tensor, explains=explains)
    if explains:
        names = [output.name for output in outputs]
        values.setdefault("statistics", "result" in names)
        if request.outputs or "outputs" not in values:
            values["outputs"] = _drawn(names)
    images = _images(tensor, request, limits=limits)
    return Call(
        model=model,
        id=request.id,
        body=RequestBody(images=images, options=validate(kind, values, prefix="parameters")),
        outputs=tuple(outputs),
        is_binary=json_bytes == "0" or request.parameters.get("binary_data_output") is True,
    )


def respond(call: Call, plan: Plan, reply: Reply) -> Response:
    """Make the response.

    Raises:
        HeatlensError: one of the images failed, or an output cannot be made.
    """
    results, top_k = good_results(reply), call.body.options.top_k
    best = [_with_best(result, top_k) for result in results]
    tensors = [
        _output(item, plan, results if EXPLAIN[item.name].of_all_classes else best)
        for item in call.outputs
    ]
    binary = [item.parameters.get("binary_data", call.is_binary) is True for item in call.outputs]
    outputs, parts = write_outputs(tensors, binary=binary)
    header = msgspec.json.encode(
        InferResponse(
            model_name=call.model,
            model_version=plan.info.card.version,
            id=UNSET if call.id is None else call.id,
            outputs=outputs,
        )
    )
    if not any(binary):
        return Response(header, media_type="application/json")
    return Response(
        b"".join([header, *parts]),
        media_type="application/octet-stream",
        headers={BINARY_LENGTH: str(len(header))},
    )


def _check_outputs(outputs: Sequence[RequestedOutput], kinds: Collection[str]) -> None:
    named: set[str] = set()
    for i, output in enumerate(outputs):
        if output.name not in kinds:
            allowed = ", ".join(kinds)
            raise InvalidOption(f"Allowed values: {allowed}.", field=f"outputs.{i}.name")
        if output.name in named:
            raise InvalidOption("This output is named twice.", field=f"outputs.{i}.name")
        named.add(output.name)


def _with_best(result: Result, top_k: int) -> Result:
    """The result with the predictions that were asked for, where more were made."""
    return structs.replace(result, predictions=(result.predictions or ())[:top_k])


def _output(wanted: RequestedOutput, plan: Plan, results: Sequence[Result]) -> Tensor:
    tensor = make_output(wanted.name, results, classes=plan.info.card.num_classes)
    count = wanted.parameters.get("classification", 0)
    if not count:
        return tensor
    if not EXPLAIN[wanted.name].of_all_classes or not isinstance(count, int) or count < 0:
        reason = "A number of classes, for scores and probabilities only."
        raise InvalidOption(reason, field="outputs.parameters.classification")
    return classification(tensor, plan.info.labels, count=count)


# ---------------------------------------------------------------- options


def _option_values(
    parameters: Parameters, kind: type[ExplainOptions | PredictOptions]
) -> dict[str, Any]:
    """The options among the parameters: those of the native API that have a scalar or text form."""
    if "model" in parameters:
        raise InvalidOption("The path names the model.", field="parameters.model")
    given = {
        name: value
        for name, value in parameters.items()
        if name not in _OTHERS and not name.startswith(_OTHER_PREFIXES)
    }
    lists = list_options(kind)
    texts = {name: str(value) for name, value in given.items() if name in lists}
    values = {**given, **parse_query(texts.items(), kind)}
    timeout_us = parameters.get("timeout")
    if timeout_us and "timeout_s" not in values:
        if not isinstance(timeout_us, int) or timeout_us < 0:
            raise InvalidOption("Must be a number of microseconds.", field="parameters.timeout")
        values["timeout_s"] = timeout_us / 1e6
    return values


def _default_outputs(
    values: Mapping[str, Any], tensor: Tensor, *, explains: bool
) -> list[RequestedOutput]:
    names = ["scores", "probabilities", "labels"]
    if explains:
        drawn = values.get("outputs", ["values", "overlay"])
        # Nothing can be drawn over normalised values, unless that is asked for: then it is refused.
        if "outputs" not in values and tensor.datatype == "FP32":
            drawn = ["values"]
        names += [_DEFAULTS[name] for name in drawn if name in _DEFAULTS]
    return [RequestedOutput(name=name) for name in names]


def _drawn(names: Sequence[str]) -> list[Output]:
    """What the native API must make for these outputs."""
    needed = [EXPLAIN[name].needs for name in names]
    # There is no native request for no output at all; values cost the least.
    return list(dict.fromkeys(need for need in needed if need)) or ["values"]


# ---------------------------------------------------------------- images


def _images(
    tensor: Tensor, request: InferRequest, *, limits: LimitSettings
) -> tuple[ImageInput, ...]:
    shape = tensor.shape
    fits = {
        "BYTES": len(shape) == 1 or shape[1:] == (1,),
        "UINT8": len(shape) == 4 and shape[-1] in (1, 3, 4),
        "FP32": len(shape) == 4,
    }
    if not fits[tensor.datatype] or not shape[0]:
        reason = (
            "Images are BYTES [N], UINT8 [N, height, width, 1, 3 or 4] or FP32 [N, 3, height, "
            "width]; N is at least 1."
        )
        raise InvalidOption(reason, field="inputs.0.shape")
    if shape[0] > limits.max_images:
        raise TooManyImages(f"A request has at most {limits.max_images} images.")
    if isinstance(tensor.values, np.ndarray):
        return tuple(ImageInput(data=np.ascontiguousarray(image)) for image in tensor.values)
    coded = request.inputs[0].parameters.get("content_type") == "base64"
    return tuple(_image(element, coded=coded) for element in tensor.values)


def _image(element: bytes, *, coded: bool) -> ImageInput:
    """An encoded image, or the base64 of one."""
    if not coded and sniff(element):
        return ImageInput(data=element)
    try:
        return ImageInput(data=decode_base64(element.decode("latin-1")))
    except ImageUndecodable as found:
        error: HeatlensError = ImageUndecodable(
            f"The element is neither an image nor base64. {found.message}", field="inputs.0.data"
        )
        return ImageInput(error=error)
