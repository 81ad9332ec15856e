"""The gRPC server: each call is a request of the REST protocol, answered by the same application."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.types import ASGIApp

from service.grpc import inference_pb2 as pb
from service.grpc.rest import Answer, BadRequest, Gateway, Headers, from_rest, to_rest
from service.settings import Settings

log = logging.getLogger("heatlens.grpc")

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_STREAM = "ModelStreamInfer"
_MESSAGE_ROOM = 1_000_000
# A message is held whole before anything of ours sees it; for more calls clients are told to wait.
_MAX_CALLS = 128
_WATCH_S = 1.0

# What a client sends along that the application reads.
_PASSED = frozenset({"authorization", "x-api-key", "x-request-id", "traceparent"})

_STATUS: Mapping[int, grpc.StatusCode] = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status codes by HTTP status; all others mean that the request is wrong."""

Context = Any
"""`grpc.aio.ServicerContext`; the library ships without annotations."""


class InferenceService:
    """The methods of the protocol."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def infer(self, request: pb.ModelInferRequest, context: Context) -> Message:
        """Classify, or explain with the model `NAME:explain` or the parameter `explain`."""
        path = _model_path(request.model_name, request.model_version)
        try:
            headers, body = to_rest(request)
        except BadRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        seconds = context.time_remaining()
        if seconds is not None:
            headers = [*headers, ("x-request-timeout-ms", str(max(1, int(1000 * seconds))))]
        answer = await self._call(context, "POST", f"{path}/infer", headers=headers, body=body)
        return from_rest(answer)

    async def stream(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[Message]:
        """Answer the requests of a stream one after the other; an error ends only its request."""
        async for request in requests:
            path = _model_path(request.model_name, request.model_version)
            try:
                headers, body = to_rest(request)
                passed = [*headers, *_passed(context)]
                answer = await self._gateway.call(
                    "POST", f"{path}/infer", headers=passed, body=body
                )
            except BadRequest as error:
                yield pb.ModelStreamInferResponse(error_message=str(error))
                continue
            if answer.status == 200:
                yield pb.ModelStreamInferResponse(infer_response=from_rest(answer))
            else:
                failed = pb.ModelInferResponse(id=request.id)
                yield pb.ModelStreamInferResponse(
                    error_message=json.loads(answer.body)["error"], infer_response=failed
                )

    async def get(self, name: str, request: Any, context: Context) -> Message:
        """Answer a call that has a path of the REST protocol, whose JSON has the message's fields."""
        method, path, body = _request(name, request)
        answer = await self._call(
            context, method, path, body=body, may_be_unready=name.endswith("Ready")
        )
        document = json.loads(answer.body)
        if name == "ModelConfig":
            document = {"config": document}
        elif name == "RepositoryIndex":
            document = {"models": document}
        message = GetMessageClass(_SERVICE.methods_by_name[name].output_type)()
        return json_format.ParseDict(document, message, ignore_unknown_fields=True)

    async def _call(
        self,
        context: Context,
        method: str,
        path: str,
        *,
        headers: Headers = (),
        body: bytes = b"",
        may_be_unready: bool = False,
    ) -> Answer:
        """Send a request, and abort the call if it fails."""
        headers = [*headers, *_passed(context)]
        answer = await self._gateway.call(method, path, headers=headers, body=body)
        if answer.status == 200 or (may_be_unready and answer.status == 503):
            return answer
        error = json.loads(answer.body)
        code = _STATUS.get(answer.status, grpc.StatusCode.INVALID_ARGUMENT)
        trailing = [("error-code", error.get("code", "")), *answer.headers.items()]
        kept = [item for item in trailing if item[0] in ("error-code", "retry-after")]
        await context.abort(code, error["error"], tuple(kept))
        raise AssertionError


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # untyped in the library
    """The standard health service: the server as a whole, and the protocol's service."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Check(  # noqa: N802 # the service's own name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Whether requests can be answered."""
        if request.service not in ("", _SERVICE.full_name):
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service.")
        return await self._status()

    async def Watch(  # noqa: N802 # the service's own name
        self, request: health_pb2.HealthCheckRequest, _: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Tell at once, and whenever it changes."""
        told = None
        while True:
            found = await self._status()
            if request.service not in ("", _SERVICE.full_name):
                found = health_pb2.HealthCheckResponse(
                    status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                )
            if found != told:
                told = found
                yield found
            await asyncio.sleep(_WATCH_S)

    async def _status(self) -> health_pb2.HealthCheckResponse:
        answer = await self._gateway.call("GET", "/v2/health/ready")
        kind = health_pb2.HealthCheckResponse
        return kind(status=kind.SERVING if answer.status == 200 else kind.NOT_SERVING)


async def start(app: ASGIApp, settings: Settings) -> grpc.aio.Server:
    """Serve on the configured port, which all HTTP processes share.

    Raises:
        RuntimeError: the port is taken by something else.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_worth_logging)
    gateway = Gateway(app)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.limits.max_body_bytes + _MESSAGE_ROOM),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 1),
        ],
        maximum_concurrent_rpcs=min(_MAX_CALLS, settings.connections.max_connections),
    )
    server.add_generic_rpc_handlers((_handlers(InferenceService(gateway)),))
    health_pb2_grpc.add_HealthServicer_to_server(Health(gateway), server)
    address = f"{settings.server.host}:{settings.server.grpc_port}"
    server.add_insecure_port(address)
    await server.start()
    log.info("serving gRPC on %s", address)
    return server


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether the library tells more than that a client left while its answer was being sent.

    It logs that as an error with a traceback, and the access log has the request already.
    """
    # The class is not public.
    return not (record.exc_info and type(record.exc_info[1]).__name__ == "ExecuteBatchError")


def _handlers(service: InferenceService) -> grpc.GenericRpcHandler:
    """The methods of the service by name."""
    handlers = {}
    for method in _SERVICE.methods:
        codec = {
            "request_deserializer": GetMessageClass(method.input_type).FromString,
            "response_serializer": GetMessageClass(method.output_type).SerializeToString,
        }
        if method.name == _STREAM:
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(service.stream, **codec)
        elif method.name == "ModelInfer":
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(service.infer, **codec)
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                _getter(service, method.name), **codec
            )
    return grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)


def _getter(service: InferenceService, name: str) -> Any:
    async def get(request: Any, context: Context) -> Message:
        return await service.get(name, request, context)

    return get


def _request(name: str, request: Any) -> tuple[str, str, bytes]:
    """Method, path and body of the REST request for a call."""
    fixed = {
        "ServerLive": "/v2/health/live",
        "ServerReady": "/v2/health/ready",
        "ServerMetadata": "/v2",
    }
    tails = {
        "ModelReady": "/ready",
        "ModelMetadata": "",
        "ModelConfig": "/config",
        "ModelStatistics": "/stats",
    }
    if name in fixed:
        return "GET", fixed[name], b""
    if name in tails:
        every = name == "ModelStatistics" and not request.name
        path = "/v2/models" if every else _model_path(request.name, request.version)
        return "GET", path + tails[name], b""
    if name == "RepositoryIndex":
        return "POST", "/v2/repository/index", json.dumps({"ready": request.ready}).encode()
    verb = "load" if name == "RepositoryModelLoad" else "unload"
    # Only the names matter: all parameters but one are refused.
    parameters = dict.fromkeys(request.parameters, "")
    path = f"/v2/repository/models/{_segment(request.model_name)}/{verb}"
    return "POST", path, json.dumps({"parameters": parameters}).encode()


def _model_path(name: str, version: str) -> str:
    path = f"/v2/models/{_segment(name)}"
    return f"{path}/versions/{_segment(version)}" if version else path


def _segment(text: str) -> str:
    """A name as one segment of a path: no model's name has a slash, or is empty."""
    return text.replace("/", "?") or "?"


def _passed(context: Context) -> Headers:
    metadata = context.invocation_metadata() or ()
    return [(key, str(value)) for key, value in metadata if key in _PASSED]
