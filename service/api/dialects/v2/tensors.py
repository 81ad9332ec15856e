"""Tensors on the wire: JSON, or the binary tensor extension, in both directions."""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET

from models.errors import BodyTooLarge, InvalidOption, MalformedBody
from models.types import Struct
from service.api.dialects.v2.schemas import InferInput, InferOutput, InferRequest
from service.api.json import check_json_size

IMAGE = "image"

# Twenty images of 224 by 224 pixels as JSON, which is the dearest way to send them.
_MAX_JSON_VALUES = 3_000_000
# Tensors have no keys, and a request has few.
_MAX_JSON_KEYS = 10_000

_DTYPES: Mapping[str, np.dtype[Any]] = {"UINT8": np.dtype(np.uint8), "FP32": np.dtype("<f4")}
_PATH = re.compile(r"(?:field `(\w+)`)?(?: - at `\$\.?([\w.\[\]]*)`)?$")
_MAX_DEPTH = 8
_MAX_DIMENSIONS = 8


class Tensor(Struct):
    """A tensor.

    Attributes:
        values: an array, or the elements of BYTES in row-major order.
        of_text: whether such elements are text, which JSON needs no base64 for.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: np.ndarray | Sequence[bytes]
    of_text: bool = True


# ---------------------------------------------------------------- reading


def read_request(body: bytes, *, json_bytes: str | None) -> tuple[InferRequest, Tensor]:
    """Read a request and its one input.

    Args:
        body: JSON, followed by binary tensors if `json_bytes` is given.
        json_bytes: the header that says how long the JSON is; 0 = the body is one image.

    Raises:
        MalformedBody: the body is not what the header says.
        InvalidOption: the request or its input is wrong; the error names the field.
    """
    split = len(body)
    if json_bytes is not None:
        if not re.fullmatch("[0-9]{1,12}", json_bytes) or int(json_bytes) > split:
            raise MalformedBody("The header Inference-Header-Content-Length is wrong.")
        split = int(json_bytes)
    if split == 0 and body:
        whole = InferInput(name=IMAGE, datatype="BYTES", shape=[1])
        elements = [_without_length(body)]
        tensor = Tensor(name=IMAGE, datatype="BYTES", shape=(1,), values=elements)
        return InferRequest(inputs=[whole]), tensor
    request = _read_json(body[:split])
    if [item.name for item in request.inputs] != [IMAGE]:
        raise InvalidOption(f"There is one input, named {IMAGE}.", field="inputs")
    return request, _read_input(request.inputs[0], memoryview(body)[split:])


def _read_json(text: bytes) -> InferRequest:
    check_json_size(text, most=_MAX_JSON_VALUES)
    if text.count(b":") > _MAX_JSON_KEYS:
        raise BodyTooLarge(f"The JSON has more than {_MAX_JSON_KEYS} keys.")
    try:
        return msgspec.json.decode(text, type=InferRequest)
    except msgspec.ValidationError as error:
        found = _PATH.search(str(error))
        parts = re.findall(r"\w+", f"{found[2] or ''} {found[1] or ''}") if found else []
        reason = "This is missing, or of the wrong type."
        raise InvalidOption(reason, field=".".join(parts)[:64] or None) from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedBody("The JSON is malformed.") from error


def _read_input(given: InferInput, binary: memoryview) -> Tensor:
    size = given.parameters.get("binary_data_size")
    if len(given.shape) > _MAX_DIMENSIONS:
        reason = f"Must have at most {_MAX_DIMENSIONS} dimensions."
        raise InvalidOption(reason, field="inputs.0.shape")
    if given.datatype not in ("BYTES", *_DTYPES):
        allowed = ", ".join(["BYTES", *_DTYPES])
        raise InvalidOption(f"Allowed values: {allowed}.", field="inputs.0.datatype")
    if len(binary) != (size or 0):
        raise MalformedBody("The binary data is not as long as binary_data_size says.")
    if size is None and given.data is UNSET:
        raise InvalidOption("This is required.", field="inputs.0.data")
    if given.datatype == "BYTES":
        values: np.ndarray | list[bytes] = (
            list(_split(binary)) if size is not None else [_bytes(e) for e in _flat(given.data)]
        )
        count = len(values)
    else:
        dtype = _DTYPES[given.datatype]
        values = _from_binary(binary, dtype) if size is not None else _numbers(given.data, dtype)
        count = values.size
    if min(given.shape, default=0) < 0 or math.prod(given.shape) != count:
        raise InvalidOption(f"The data has {count} elements.", field="inputs.0.shape")
    shape = tuple(given.shape)
    if isinstance(values, np.ndarray):
        values = values.reshape(shape)
    return Tensor(name=given.name, datatype=given.datatype, shape=shape, values=values)


def _without_length(data: bytes) -> bytes:
    """An element of BYTES as the whole body; some clients send its length before it."""
    return data[4:] if int.from_bytes(data[:4], "little") == len(data) - 4 else data


def _split(binary: memoryview) -> Iterator[bytes]:
    start = 0
    while start < len(binary):
        (length,) = struct.unpack_from("<I", binary, start) if start + 4 <= len(binary) else (-1,)
        end = start + 4 + length
        if length < 0 or end > len(binary):
            raise MalformedBody("The binary data is not a sequence of lengths and elements.")
        yield bytes(binary[start + 4 : end])
        start = end


def _from_binary(binary: memoryview, dtype: np.dtype[Any]) -> np.ndarray:
    if len(binary) % dtype.itemsize:
        raise MalformedBody("The binary data ends within an element.")
    return np.frombuffer(binary, dtype)


def _flat(data: Any, depth: int = 0) -> Iterator[Any]:
    """The elements of a list of lists."""
    if not isinstance(data, list):
        yield data
    elif depth > _MAX_DEPTH:
        raise InvalidOption("The lists are nested too deeply.", field="inputs.0.data")
    else:
        for item in data:
            yield from _flat(item, depth + 1)


def _bytes(element: Any) -> bytes:
    if not isinstance(element, str):
        raise InvalidOption("An element of BYTES must be text.", field="inputs.0.data")
    # JSON may hold halves of surrogate pairs; such text is not base64 either.
    return element.encode(errors="replace")


def _numbers(data: Any, dtype: np.dtype[Any]) -> np.ndarray:
    try:
        found = np.array(data)
    except (ValueError, OverflowError):
        found = np.array(None)
    if found.size == 0:
        return np.zeros(0, dtype)
    if dtype.kind == "u" and (found.dtype.kind not in "iu" or found.min() < 0 or found.max() > 255):
        raise InvalidOption("An element of UINT8 must be 0 to 255.", field="inputs.0.data")
    if found.dtype.kind not in "iuf":
        raise InvalidOption("The elements are not all numbers.", field="inputs.0.data")
    # Overflow gives infinity, which is refused like any other.
    with np.errstate(over="ignore"):
        return found.astype(dtype).reshape(-1)


# ---------------------------------------------------------------- writing


def write_outputs(
    tensors: Sequence[Tensor], *, binary: Sequence[bool]
) -> tuple[tuple[InferOutput, ...], list[bytes]]:
    """Turn tensors into outputs of a response, and those that are binary into its binary part."""
    outputs, parts = [], []
    for tensor, is_binary in zip(tensors, binary, strict=True):
        described = InferOutput(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if is_binary:
            parts.append(_to_binary(tensor.values))
            size = {"binary_data_size": len(parts[-1])}
            outputs.append(msgspec.structs.replace(described, parameters=size))
        else:
            outputs.append(_to_json(described, tensor))
    return tuple(outputs), parts


def _to_binary(values: np.ndarray | Sequence[bytes]) -> bytes:
    if isinstance(values, np.ndarray):
        return values.tobytes()
    return b"".join(struct.pack("<I", len(element)) + element for element in values)


def _to_json(described: InferOutput, tensor: Tensor) -> InferOutput:
    values = tensor.values
    if isinstance(values, np.ndarray):
        return msgspec.structs.replace(described, data=values.reshape(-1).tolist())
    if tensor.of_text:
        return msgspec.structs.replace(described, data=[element.decode() for element in values])
    coded = [base64.b64encode(element).decode() for element in values]
    return msgspec.structs.replace(described, data=coded, parameters={"content_type": "base64"})
