"""NVIDIA's `tritonclient`, over HTTP (also asynchronous) and gRPC: every call that carries data."""

from __future__ import annotations

import asyncio
import io
import queue
from typing import Any

import pytest

pytestmark = pytest.mark.conformance

np = pytest.importorskip("numpy")
http = pytest.importorskip("tritonclient.http", exc_type=ImportError)
http_aio = pytest.importorskip("tritonclient.http.aio", exc_type=ImportError)
grpc = pytest.importorskip("tritonclient.grpc", exc_type=ImportError)
grpc_aio = pytest.importorskip("tritonclient.grpc.aio", exc_type=ImportError)

from expected import ADMIN, MODEL, Native, Service  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

KINDS = {"http": http, "grpc": grpc}


def connect(kind: str, service: Service) -> Any:
    if kind == "http":
        # A model may take long to load.
        return http.InferenceServerClient(service.http, concurrency=4, network_timeout=300)
    return grpc.InferenceServerClient(service.grpc)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def client(kind: str, service: Service) -> Any:
    made = connect(kind, service)
    yield made
    made.close()


def image_input(module: Any, png: bytes, **binary: bool) -> Any:
    given = module.InferInput("image", [1], "BYTES")
    given.set_data_from_numpy(np.array([png], dtype=object), **binary)
    return given


def check(result: Any, native: Native) -> None:
    """The result is that of the native API, every bit of it."""
    heatmap = result.as_numpy("heatmap")
    assert heatmap.dtype == np.float32
    assert heatmap.shape == (1, *native.shape)
    assert heatmap.tobytes() == native.heatmap
    scores, probabilities = (result.as_numpy(name) for name in ("scores", "probabilities"))
    assert scores.shape == probabilities.shape == (1, 1000)
    for index, (score, probability) in native.predictions.items():
        assert scores[0, index] == np.float32(score)
        assert probabilities[0, index] == np.float32(probability)
    assert [label.decode() for label in result.as_numpy("labels")[0]] == native.labels
    assert result.as_numpy("overlay")[0] == native.overlay


def check_of_a_batch(result: Any, native: Native) -> None:
    """The result is that of the native API up to rounding, which differs with the size of a batch."""
    heatmap = result.as_numpy("heatmap")[0]
    expected = np.frombuffer(native.heatmap, np.float32).reshape(native.shape)
    np.testing.assert_allclose(heatmap, expected, rtol=1e-4, atol=1e-5)
    scores = result.as_numpy("scores")[0]
    for index, (score, _) in native.predictions.items():
        assert scores[index] == pytest.approx(score, rel=1e-4)
    assert [label.decode() for label in result.as_numpy("labels")[0]] == native.labels


# ---------------------------------------------------------------- server and models


def test_health_and_metadata(client: Any, kind: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    as_json = {} if kind == "http" else {"as_json": True}
    assert client.get_server_metadata(**as_json)["name"] == "heatlens"
    for name in (MODEL, f"{MODEL}:explain"):
        found = client.get_model_metadata(name, **as_json)
        assert found["name"] == name
        assert found["inputs"][0]["name"] == "image"
        names = [item["name"] for item in found["outputs"]]
        assert ("heatmap" in names) is (name != MODEL)
        config = client.get_model_config(name, **as_json)
        config = config.get("config", config)
        assert config["max_batch_size"] == 32
        assert [item["name"] for item in config["output"]] == names


def test_an_unknown_model(client: Any, kind: str, png: bytes) -> None:
    module = KINDS[kind]
    with pytest.raises(InferenceServerException, match="no such model") as caught:
        client.get_model_metadata("nope")
    assert caught.value.status() == {"http": "404", "grpc": "StatusCode.NOT_FOUND"}[kind]
    with pytest.raises(InferenceServerException, match="no such model"):
        client.infer("nope", [image_input(module, png)])
    with pytest.raises(InferenceServerException, match="no such model"):
        client.infer(MODEL, [image_input(module, png)], model_version="7")


def test_statistics(client: Any, kind: str, png: bytes) -> None:
    as_json = {} if kind == "http" else {"as_json": True}

    def read() -> dict[str, Any]:
        (found,) = client.get_inference_statistics(MODEL, **as_json)["model_stats"]
        return found

    before = read()
    for _ in range(3):
        client.infer(MODEL, [image_input(KINDS[kind], png)])
    after = read()
    for name in ("inference_count", "execution_count"):
        assert int(after[name]) - int(before.get(name, 0)) == 3
    took = after["inference_stats"]
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert int(took[name]["count"]) >= 3
        assert int(took[name]["ns"]) > 0
    assert client.get_inference_statistics(**as_json)["model_stats"]


# ---------------------------------------------------------------- inference


def test_an_explanation(client: Any, kind: str, png: bytes, native: Native) -> None:
    check(client.infer(f"{MODEL}:explain", [image_input(KINDS[kind], png)]), native)


def test_options_identity_and_the_order_of_outputs(
    client: Any, kind: str, png: bytes, native: Native
) -> None:
    module = KINDS[kind]
    names = ["overlay", "labels", "heatmap", "scores", "probabilities"]
    result = client.infer(
        MODEL,
        [image_input(module, png)],
        outputs=[module.InferRequestedOutput(name) for name in names],
        model_version="1",
        request_id="seven",
        priority=1,
        timeout=20_000_000,
        parameters={"explain": True, "targets": native.labels[0], "alpha": 0.5},
    )
    check(result, native)
    response = result.get_response()
    if kind == "http":
        assert response["id"] == "seven"
        assert [item["name"] for item in response["outputs"]] == names
    else:
        assert response.id == "seven"
        assert [item.name for item in response.outputs] == names


def test_the_classification_extension(client: Any, kind: str, png: bytes, native: Native) -> None:
    module = KINDS[kind]
    wanted = [module.InferRequestedOutput("probabilities", class_count=3)]
    result = client.infer(MODEL, [image_input(module, png)], outputs=wanted)
    found = [text.decode().split(":") for text in result.as_numpy("probabilities")[0]]
    assert [int(index) for _, index, _ in found] == list(native.predictions)[:3]
    assert [label for _, _, label in found] == native.labels[:3]


def test_pixels_and_normalised_values(client: Any, kind: str, png: bytes, native: Native) -> None:
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(png))
    pixels = np.asarray(image)[None]
    module = KINDS[kind]
    given = module.InferInput("image", list(pixels.shape), "UINT8")
    given.set_data_from_numpy(pixels)
    check(client.infer(f"{MODEL}:explain", [given]), native)
    values = np.zeros((2, 3, 224, 224), np.float32)
    given = module.InferInput("image", [2, 3, 224, 224], "FP32")
    given.set_data_from_numpy(values)
    result = client.infer(f"{MODEL}:explain", [given])
    assert result.as_numpy("heatmap").shape == (2, *native.shape)
    overlay = [module.InferRequestedOutput("overlay")]
    with pytest.raises(InferenceServerException, match="not an image"):
        client.infer(f"{MODEL}:explain", [given], outputs=overlay)


def test_what_is_not_an_image(client: Any, kind: str) -> None:
    with pytest.raises(InferenceServerException, match="neither an image nor base64"):
        client.infer(MODEL, [image_input(KINDS[kind], b"\xff\xfe")])
    wrong = KINDS[kind].InferInput("picture", [1], "BYTES")
    wrong.set_data_from_numpy(np.array([b"x"], dtype=object))
    with pytest.raises(InferenceServerException, match="named image"):
        client.infer(MODEL, [wrong])


@pytest.mark.parametrize("output_binary", [False, True])
@pytest.mark.parametrize("input_binary", [False, True])
@pytest.mark.parametrize("request_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_coding", [None, "gzip", "deflate"])
def test_binary_and_compression_over_http(
    service: Service,
    png: bytes,
    b64: str,
    native: Native,
    input_binary: bool,
    output_binary: bool,
    request_coding: str | None,
    response_coding: str | None,
) -> None:
    with http.InferenceServerClient(service.http) as client:
        names = ["heatmap", "scores", "probabilities", "labels"]
        result = client.infer(
            f"{MODEL}:explain",
            # The client sends text alone as JSON.
            [image_input(http, png if input_binary else b64.encode(), binary_data=input_binary)],
            outputs=[http.InferRequestedOutput(n, binary_data=output_binary) for n in names],
            request_compression_algorithm=request_coding,
            response_compression_algorithm=response_coding,
        )
        assert result.as_numpy("heatmap").tobytes() == native.heatmap
        labels = result.as_numpy("labels")[0]
        found = [label.decode() if isinstance(label, bytes) else label for label in labels]
        assert found == native.labels


def test_requests_in_parallel_over_http(client: Any, kind: str, png: bytes, native: Native) -> None:
    if kind == "http":
        pending = [
            client.async_infer(f"{MODEL}:explain", [image_input(http, png)]) for _ in range(6)
        ]
        results = [item.get_result() for item in pending]
    else:
        done: queue.Queue[Any] = queue.Queue()
        for _ in range(6):
            client.async_infer(
                f"{MODEL}:explain",
                [image_input(grpc, png)],
                callback=lambda result, error: done.put(error or result),
            )
        results = [done.get(timeout=60) for _ in range(6)]
    for result in results:
        check_of_a_batch(result, native)


def test_the_asynchronous_clients(kind: str, service: Service, png: bytes, native: Native) -> None:
    async def ask() -> Any:
        if kind == "http":
            client = http_aio.InferenceServerClient(service.http)
        else:
            client = grpc_aio.InferenceServerClient(service.grpc)
        async with client:
            assert await client.is_server_ready()
            assert await client.is_model_ready(MODEL)
            await client.get_model_metadata(MODEL)
            await client.get_inference_statistics(MODEL)
            asked = [
                client.infer(f"{MODEL}:explain", [image_input(KINDS[kind], png)]) for _ in range(3)
            ]
            return await asyncio.gather(*asked)

    for result in asyncio.run(ask()):
        check_of_a_batch(result, native)


def test_a_stream(service: Service, png: bytes, native: Native) -> None:
    done: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(service.grpc) as client:
        client.start_stream(lambda result, error: done.put((result, error)))
        for name in (f"{MODEL}:explain", "nope", f"{MODEL}:explain"):
            client.async_stream_infer(name, [image_input(grpc, png)], request_id=name)
        (first, _), (_, error), (last, _) = (done.get(timeout=60) for _ in range(3))
        client.stop_stream()
    check_of_a_batch(first, native)
    check_of_a_batch(last, native)
    assert "no such model" in error.message()


def test_grpc_compression_deadlines_and_size(service: Service, png: bytes, native: Native) -> None:
    with grpc.InferenceServerClient(service.grpc) as client:
        given = [image_input(grpc, png)]
        for algorithm in ("gzip", "deflate"):
            check(client.infer(f"{MODEL}:explain", given, compression_algorithm=algorithm), native)
        with pytest.raises(InferenceServerException, match=r"[Dd]eadline"):
            client.infer(MODEL, given, client_timeout=1e-3)
        with pytest.raises(InferenceServerException) as caught:
            client.infer(MODEL, [image_input(grpc, bytes(25_000_000))])
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_shared_memory_is_not_offered(client: Any) -> None:
    """Clients never name memory of the machine; nor do they change traces or logs."""
    for call in (client.get_system_shared_memory_status, client.get_trace_settings):
        with pytest.raises(InferenceServerException):
            call()


# ---------------------------------------------------------------- administration


def test_the_repository(client: Any, kind: str, png: bytes, native: Native) -> None:
    as_json = {} if kind == "http" else {"as_json": True}
    headers = {key.lower(): value for key, value in ADMIN.items()}
    for call in (
        client.get_model_repository_index,
        lambda **rest: client.load_model(MODEL, **rest),
    ):
        with pytest.raises(InferenceServerException, match="key is required"):
            call()
    index = client.get_model_repository_index(headers=headers, **as_json)
    models = index if kind == "http" else index["models"]
    assert [(m["name"], m["state"]) for m in models] == [(MODEL, "READY")]
    client.unload_model(MODEL, headers=headers)
    assert client.is_server_live()
    with pytest.raises(InferenceServerException):
        client.infer(MODEL, [image_input(KINDS[kind], png)])
    client.load_model(MODEL, headers=headers)
    check(client.infer(f"{MODEL}:explain", [image_input(KINDS[kind], png)]), native)
    with pytest.raises(InferenceServerException, match="only as the configuration"):
        client.load_model(MODEL, headers=headers, config="{}")
