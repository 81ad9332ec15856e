"""The REST protocol for gRPC: calls of the application in this process, and messages made of them.

Each call is a request to the HTTP application, so that gRPC shares its keys, limits and metrics.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from msgspec import Struct
from starlette.types import ASGIApp, Message

from service.grpc import inference_pb2 as pb

Headers = Sequence[tuple[str, str]]

BINARY_LENGTH = "inference-header-content-length"

# Fields of contents by datatype, and how their elements are stored.
_CONTENTS: Mapping[str, tuple[str, str]] = {
    "UINT8": ("uint_contents", "u1"),
    "FP32": ("fp32_contents", "<f4"),
}

# What a message may have is read and copied while nobody else is served.
_MAX_FIELDS = 1000
_MAX_VALUES = 3_000_000


class BadRequest(Exception):
    """The message has no meaning; the text says why."""


class Answer(Struct, frozen=True):
    """A response of the application."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Gateway:
    """Sends requests to an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def call(
        self, method: str, path: str, *, headers: Headers = (), body: bytes = b""
    ) -> Answer:
        """Send one request; cancelling this cancels its work."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        status, found = 500, dict[str, str]()
        parts: list[bytes] = []

        async def receive() -> Message:
            if messages:
                return messages.pop()
            # The client leaves by cancelling.
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status, found
            if message["type"] == "http.response.start":
                status = message["status"]
                found = {k.decode("latin-1"): v.decode("latin-1") for k, v in message["headers"]}
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._app(_scope(method, path, headers), receive, send)
        return Answer(status=status, headers=found, body=b"".join(parts))


def _scope(method: str, path: str, headers: Headers) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "2",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path).encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (k.lower().encode("latin-1"), v.encode("latin-1", "replace")) for k, v in headers
        ],
        "client": None,
        "server": None,
        "state": {},
    }


def to_rest(request: pb.ModelInferRequest) -> tuple[Headers, bytes]:
    """Headers and body of the REST request; every tensor is binary.

    Raises:
        BadRequest: the tensors' data is neither in the one nor in the other place, or the message
            has far more fields than a request needs.
    """
    _check_size(request)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequest("raw_input_contents has one element for each input.")
    parts = [*raw] if raw else [_contents(tensor) for tensor in request.inputs]
    document = {
        "id": request.id or None,
        "parameters": {**_parameters(request.parameters), "binary_data_output": True},
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {**_parameters(tensor.parameters), "binary_data_size": len(part)},
            }
            for tensor, part in zip(request.inputs, parts, strict=True)
        ],
    }
    if request.outputs:
        document["outputs"] = [
            {"name": output.name, "parameters": _parameters(output.parameters)}
            for output in request.outputs
        ]
    text = json.dumps(document).encode()
    return [(BINARY_LENGTH, str(len(text)))], b"".join([text, *parts])


def _check_size(request: pb.ModelInferRequest) -> None:
    fields = [request.inputs, request.outputs, request.parameters, request.raw_input_contents]
    for tensor in request.inputs[:_MAX_FIELDS]:
        fields += [tensor.shape, tensor.parameters, tensor.contents.bytes_contents]
    fields += [output.parameters for output in request.outputs[:_MAX_FIELDS]]
    if sum(map(len, fields)) > _MAX_FIELDS:
        raise BadRequest(f"The message has more than {_MAX_FIELDS} fields.")


def from_rest(answer: Answer) -> pb.ModelInferResponse:
    """The message of a REST response; every tensor is raw."""
    split = int(answer.headers[BINARY_LENGTH])
    document = json.loads(answer.body[:split])
    response = pb.ModelInferResponse(
        model_name=document["model_name"],
        model_version=document["model_version"],
        id=str(document.get("id", "")),
    )
    for output in document["outputs"]:
        response.outputs.add(
            name=output["name"], datatype=output["datatype"], shape=output["shape"]
        )
        end = split + output["parameters"]["binary_data_size"]
        response.raw_output_contents.append(answer.body[split:end])
        split = end
    return response


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return {name: getattr(parameters[name], field) for name, field in chosen.items() if field}


def _contents(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes:
    contents = tensor.contents
    if tensor.datatype == "BYTES":
        elements = contents.bytes_contents
        return b"".join(struct.pack("<I", len(element)) + element for element in elements)
    if tensor.datatype not in _CONTENTS:
        # The REST protocol names the datatypes that are accepted.
        return b""
    field, dtype = _CONTENTS[tensor.datatype]
    given = getattr(contents, field)
    if len(given) > _MAX_VALUES:
        raise BadRequest("Send so many values as raw_input_contents.")
    values = np.array(given, np.float64)
    if dtype == "u1" and values.size and values.max() > 255:
        raise BadRequest("An element of UINT8 is 0 to 255.")
    return values.astype(dtype).tobytes()
