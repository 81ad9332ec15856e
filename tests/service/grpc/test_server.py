"""The Open Inference Protocol over gRPC: the same answers as over REST, keys, errors, health."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grpc", reason="the extra grpc is not installed")
pytest.importorskip("grpc_health", reason="the extra grpc is not installed")

import grpc
import grpc.aio
from grpc._cython.cygrpc import ExecuteBatchError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.api.app import create_app
from service.devices.pool import DeviceStatus
from service.grpc import inference_pb2 as pb
from service.grpc.rest import Gateway
from service.grpc.server import start
from service.settings import Settings
from tests.fakes import LABELS, FakePool
from tests.waiting import eventually

pytestmark = pytest.mark.anyio

MODEL = "efficientnet_lite0"


def draw() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


PNG = draw()


class Client:
    """Calls methods by name; also the REST API of the same application."""

    def __init__(self, channel: grpc.aio.Channel, rest: httpx.AsyncClient) -> None:
        self.rest = rest
        self.channel = channel

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[name]
        output = getattr(pb, method.output_type.name)
        make = self.channel.stream_stream if "Stream" in name else self.channel.unary_unary
        return make(
            f"/inference.GRPCInferenceService/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=output.FromString,
        )

    async def infer(self, request: Any, **rest: Any) -> dict[str, Any]:
        """The outputs by name."""
        return read(await self.ModelInfer(request, **rest))


@asynccontextmanager
async def serving(pool: FakePool, **sections: Any) -> AsyncIterator[Client]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = Settings(**{"server": {"grpc_port": port}, **sections})
    app = create_app(settings, pool)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        server = await start(app, settings)
        stack.push_async_callback(server.stop, 1)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        transport = httpx.ASGITransport(app)
        rest = httpx.AsyncClient(transport=transport, base_url="http://testserver")
        yield Client(channel, await stack.enter_async_context(rest))


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
async def client(pool: FakePool) -> AsyncIterator[Client]:
    async with serving(pool) as client:
        yield client


def request_of(png: bytes = PNG, model: str = f"{MODEL}:explain", **fields: Any) -> Any:
    request = pb.ModelInferRequest(model_name=model, **fields)
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(struct.pack("<I", len(png)) + png)
    return request


def elements(raw: io.BytesIO) -> Iterator[bytes]:
    while length := raw.read(4):
        yield raw.read(*struct.unpack("<I", length))


def read(response: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            found[output.name] = list(elements(io.BytesIO(raw)))
        else:
            found[output.name] = np.frombuffer(raw, "<f4").reshape(tuple(output.shape))
    return found


async def refused(call: Any, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code, caught.value.details()
    return caught.value


# ---------------------------------------------------------------- inference


async def test_an_explanation_is_that_of_the_native_api(client: Client) -> None:
    request = request_of(id="nine", model_version="1")
    request.parameters["methods"].string_param = "layercam"
    request.parameters["targets"].int64_param = 2
    response = await client.ModelInfer(request)
    assert (response.id, response.model_version) == ("nine", "1")
    found = read(response)
    body = {
        "images": [{"b64": base64.b64encode(PNG).decode()}],
        "methods": ["layercam"],
        "targets": [2],
        "outputs": ["values", "overlay"],
    }
    native = (await client.rest.post("/v1/explain", json=body)).json()["results"][0]
    (explanation,) = native["explanations"]
    assert found["heatmap"].tobytes() == base64.b64decode(explanation["values"]["data"])
    assert found["overlay"] == [base64.b64decode(explanation["overlay"]["data"])]
    assert found["labels"] == [p["label"].encode() for p in native["predictions"]]


async def test_the_parameter_explain_and_requested_outputs(client: Client) -> None:
    request = request_of(model=MODEL)
    request.parameters["explain"].bool_param = True
    request.outputs.add(name="heatmap")
    request.outputs.add(name="scores").parameters["classification"].int64_param = 2
    found = await client.infer(request)
    assert list(found) == ["heatmap", "scores"]
    assert len(found["scores"]) == 2


async def test_contents_in_place_of_raw_contents(client: Client) -> None:
    expected = await client.infer(request_of(model=MODEL))
    request = pb.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
        PNG
    )
    found = await client.infer(request)
    assert found["scores"].tobytes() == expected["scores"].tobytes()
    pixels = np.asarray(Image.open(io.BytesIO(PNG)))[None]
    request = pb.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=pixels.shape)
    tensor.contents.uint_contents.extend(pixels.ravel().tolist())
    found = await client.infer(request)
    assert found["scores"].tobytes() == expected["scores"].tobytes()
    values = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    request = pb.ModelInferRequest(model_name=f"{MODEL}:explain")
    tensor = request.inputs.add(name="image", datatype="FP32", shape=values.shape)
    tensor.contents.fp32_contents.extend(values.ravel().tolist())
    assert "overlay" not in await client.infer(request)


async def test_the_numbers_reach_the_device_unchanged(client: Client, pool: FakePool) -> None:
    values = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    request = pb.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name="image", datatype="FP32", shape=values.shape)
    tensor.contents.fp32_contents.extend(values.ravel().tolist())
    await client.infer(request)
    assert pool.submitted[0].input.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("change", "code", "typed"),
    [
        (lambda r: r.raw_input_contents.append(b""), grpc.StatusCode.INVALID_ARGUMENT, ""),
        (lambda r: r.raw_input_contents.pop(), grpc.StatusCode.INVALID_ARGUMENT, "invalid_option"),
        (lambda r: r.inputs.pop(), grpc.StatusCode.INVALID_ARGUMENT, ""),
        (
            lambda r: setattr(r.inputs[0], "datatype", "FP64"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "invalid_option",
        ),
        (lambda r: setattr(r, "model_name", "nope"), grpc.StatusCode.NOT_FOUND, "unknown_model"),
        (lambda r: setattr(r, "model_name", "a/infer"), grpc.StatusCode.NOT_FOUND, "unknown_model"),
        (lambda r: setattr(r, "model_name", ""), grpc.StatusCode.NOT_FOUND, "unknown_model"),
        (
            lambda r: setattr(r.parameters["alpha"], "double_param", float("nan")),
            grpc.StatusCode.INVALID_ARGUMENT,
            "malformed_body",
        ),
        (
            lambda r: r.inputs[0].shape.extend([1] * 2000),
            grpc.StatusCode.INVALID_ARGUMENT,
            "",
        ),
        (
            lambda r: [r.outputs.add(name="scores") for _ in range(2000)],
            grpc.StatusCode.INVALID_ARGUMENT,
            "",
        ),
        (
            lambda r: r.outputs.add(name="nope"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "invalid_option",
        ),
    ],
)
async def test_what_is_refused(
    client: Client, change: Callable[[Any], Any], code: grpc.StatusCode, typed: str
) -> None:
    request = request_of()
    change(request)
    error = await refused(client.ModelInfer(request), code)
    assert error.details()
    found = dict(error.trailing_metadata() or ())
    assert found.get("error-code", "") == typed


async def test_pixels_out_of_range(client: Client) -> None:
    request = pb.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 1, 1])
    tensor.contents.uint_contents.append(256)
    await refused(client.ModelInfer(request), grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_message_larger_than_a_body_may_be(pool: FakePool) -> None:
    async with serving(pool, limits={"max_body_mb": 1}) as client:
        call = client.ModelInfer(request_of(bytes(2_500_000)))
        await refused(call, grpc.StatusCode.RESOURCE_EXHAUSTED)
        call = client.ModelInfer(request_of(bytes(1_500_000)))
        error = await refused(call, grpc.StatusCode.INVALID_ARGUMENT)
        assert dict(error.trailing_metadata())["error-code"] == "body_too_large"


async def test_a_client_that_leaves_cancels_its_job(client: Client, pool: FakePool) -> None:
    pool.delay_s = 30
    call = client.ModelInfer(request_of())
    await pool.arrived.wait()
    call.cancel()
    await eventually(lambda: pool.cancelled, timeout_s=5)
    assert pool.cancelled == [pool.submitted[0].id]
    assert "heatlens_cancelled_total 1.0" in (await client.rest.get("/metrics")).text


@pytest.mark.parametrize(
    ("error", "logged"), [(ExecuteBatchError("Failed"), 0), (RuntimeError("a fault"), 1)]
)
async def test_only_faults_are_logged_as_errors_and_not_clients_that_leave_as_they_are_answered(
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    logged: int,
) -> None:
    # What the library raises where it cannot send: an answer that meets a client's end.
    async def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Gateway, "call", fail)
    with pytest.raises(grpc.RpcError):
        await client.ModelInfer(request_of(), timeout=0.5)
    assert sum(record.exc_info is not None for record in caplog.records) == logged


async def test_the_deadline_of_the_call_is_that_of_the_job(client: Client, pool: FakePool) -> None:
    pool.delay_s = 30
    call = client.ModelInfer(request_of(), timeout=0.5)
    await refused(call, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert len(pool.submissions) == 1


async def test_a_stream_survives_its_errors(client: Client) -> None:
    requests = [request_of(id="1"), request_of(id="2", model="nope"), request_of(id="3")]
    requests[2].raw_input_contents.append(b"")
    found = [item async for item in client.ModelStreamInfer(iter([*requests, request_of(id="4")]))]
    assert [item.infer_response.id for item in found] == ["1", "2", "", "4"]
    assert [bool(item.error_message) for item in found] == [False, True, True, False]
    assert "no such model" in found[1].error_message


# ---------------------------------------------------------------- everything else


async def test_health(client: Client, pool: FakePool) -> None:
    stub = health_pb2_grpc.HealthStub(client.channel)
    check = health_pb2.HealthCheckRequest
    kind = health_pb2.HealthCheckResponse
    for name in ("", "inference.GRPCInferenceService"):
        assert (await stub.Check(check(service=name))).status == kind.SERVING
    await refused(stub.Check(check(service="nope")), grpc.StatusCode.NOT_FOUND)
    assert (await client.ServerLive(pb.ServerLiveRequest())).live
    assert (await client.ServerReady(pb.ServerReadyRequest())).ready
    watch = stub.Watch(check())
    assert (await watch.read()).status == kind.SERVING
    pool.statuses = [DeviceStatus(device="cpu", state="lost")]
    assert (await stub.Check(check())).status == kind.NOT_SERVING
    assert not (await client.ServerReady(pb.ServerReadyRequest())).ready
    assert (await client.ServerLive(pb.ServerLiveRequest())).live
    assert (await watch.read()).status == kind.NOT_SERVING
    watch.cancel()


async def test_metadata_configuration_and_statistics(client: Client) -> None:
    assert (await client.ServerMetadata(pb.ServerMetadataRequest())).name == "heatlens"
    assert (await client.ModelReady(pb.ModelReadyRequest(name=MODEL, version="1"))).ready
    found = await client.ModelMetadata(pb.ModelMetadataRequest(name=f"{MODEL}:explain"))
    assert [tuple(o.shape) for o in found.outputs if o.name == "heatmap"] == [(-1, -1, -1)]
    config = (await client.ModelConfig(pb.ModelConfigRequest(name=MODEL))).config
    assert config.max_batch_size == 32
    assert config.output[0].data_type == pb.TYPE_FP32
    assert list(config.output[0].dims) == [len(LABELS)]
    await client.infer(request_of())
    (stats,) = (await client.ModelStatistics(pb.ModelStatisticsRequest())).model_stats
    assert (stats.name, stats.inference_count) == (MODEL, 1)
    assert stats.inference_stats.compute_infer.ns == 2_000_000
    call = client.ModelMetadata(pb.ModelMetadataRequest(name="nope"))
    await refused(call, grpc.StatusCode.NOT_FOUND)


async def test_keys(pool: FakePool) -> None:
    async with serving(pool, security={"api_keys": ["user"], "admin_keys": ["admin"]}) as client:
        call = client.ModelInfer(request_of())
        error = await refused(call, grpc.StatusCode.UNAUTHENTICATED)
        assert dict(error.trailing_metadata())["error-code"] == "unauthorized"
        user, admin = [("authorization", "Bearer user")], [("x-api-key", "admin")]
        assert await client.infer(request_of(), metadata=user)
        index = client.RepositoryIndex(pb.RepositoryIndexRequest(), metadata=user)
        await refused(index, grpc.StatusCode.PERMISSION_DENIED)
        index = await client.RepositoryIndex(pb.RepositoryIndexRequest(), metadata=admin)
        assert [(m.name, m.state) for m in index.models] == [(MODEL, "READY")]
        await client.RepositoryModelUnload(
            pb.RepositoryModelUnloadRequest(model_name=MODEL), metadata=admin
        )
        index = pb.RepositoryIndexRequest(ready=True)
        assert not (await client.RepositoryIndex(index, metadata=admin)).models
        load = pb.RepositoryModelLoadRequest(model_name=MODEL)
        await client.RepositoryModelLoad(load, metadata=admin)
        load.parameters["config"].string_param = json.dumps({})
        call = client.RepositoryModelLoad(load, metadata=admin)
        await refused(call, grpc.StatusCode.INVALID_ARGUMENT)
        assert (await client.ServerReady(pb.ServerReadyRequest())).ready


async def test_a_method_that_is_not_offered(client: Client) -> None:
    call = client.channel.unary_unary("/inference.GRPCInferenceService/SystemSharedMemoryStatus")
    await refused(call(b""), grpc.StatusCode.UNIMPLEMENTED)
