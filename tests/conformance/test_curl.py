"""What users of TorchServe, SageMaker, Vertex AI and perf_analyzer send, by curl."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from expected import MODEL, Native, Service

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]


def curl(*arguments: str) -> bytes:
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60"]
    return subprocess.run([*command, *arguments], check=True, capture_output=True).stdout


@pytest.fixture
def file(tmp_path: Path, png: bytes) -> str:
    path = tmp_path / "kitten.png"
    path.write_bytes(png)
    return str(path)


def test_torchserve(service: Service, file: str, native: Native) -> None:
    assert json.loads(curl(f"{service.url}/ping")) == {"status": "Healthy"}
    expected = {
        label: probability
        for label, (_, probability) in zip(native.labels, native.predictions.values(), strict=True)
    }
    url = f"{service.url}/predictions/{MODEL}"
    for arguments in (["-T", file], ["--data-binary", f"@{file}"], ["-F", f"data=@{file}"]):
        assert json.loads(curl(url, *arguments)) == expected
    assert json.loads(curl(f"{url}/1", "-T", file)) == expected
    query = "outputs=heatmap,overlay,values"
    found = json.loads(curl(f"{service.url}/explanations/{MODEL}?{query}", "-T", file))
    assert found == native.result
    found = json.loads(curl(f"{service.url}/predictions/nope", "-T", file))
    assert (found["code"], found["type"]) == (404, "unknown_model")


def test_sagemaker(service: Service, file: str, native: Native) -> None:
    image = ["-H", "Content-Type: application/x-image", "--data-binary", f"@{file}"]
    found = json.loads(curl(f"{service.url}/invocations", *image))
    assert found["results"][0]["predictions"] == native.result["predictions"]
    options = "X-Amzn-SageMaker-Custom-Attributes: explain=true&outputs=heatmap,overlay,values"
    found = json.loads(curl(f"{service.url}/invocations", *image, "-H", options))
    assert found["results"] == [native.result]


def test_a_raw_image_by_the_binary_extension(
    service: Service, file: str, tmp_path: Path, native: Native
) -> None:
    body = tmp_path / "answer"
    head = curl(
        f"{service.url}/v2/models/{MODEL}/explain",
        *("-H", "Inference-Header-Content-Length: 0", "--data-binary", f"@{file}"),
        *("-o", str(body), "-D", "-"),
    ).decode()
    (length,) = (
        int(line.partition(":")[2])
        for line in head.splitlines()
        if line.lower().startswith("inference-header-content-length")
    )
    answer = body.read_bytes()
    at, found = length, {}
    for output in json.loads(answer[:length])["outputs"]:
        end = at + output["parameters"]["binary_data_size"]
        found[output["name"]], at = answer[at:end], end
    assert found["heatmap"] == native.heatmap
    assert found["overlay"] == struct.pack("<I", len(native.overlay)) + native.overlay


def test_the_calls_of_perf_analyzer(service: Service, b64: str, tmp_path: Path) -> None:
    """`perf_analyzer -m MODEL --input-data data.json -i http`, as its documentation describes it.

    It reads server and model metadata and the configuration, sends inferences whose inputs and
    requested outputs are those of the metadata, and reads the statistics before and after.
    """

    def get(path: str) -> Any:
        return json.loads(curl(f"{service.url}/v2{path}"))

    assert "statistics" in get("")["extensions"]
    for name in (MODEL, f"{MODEL}:explain"):
        metadata, config = get(f"/models/{name}"), get(f"/models/{name}/config")
        assert config["max_batch_size"] > 1
        assert "sequence_batching" not in config
        (given,) = metadata["inputs"]
        before = get(f"/models/{name}/versions/1/stats")["model_stats"][0]
        document = {
            "id": "1",
            "inputs": [{**given, "shape": [2], "data": [b64, b64]}],
            "outputs": [
                {"name": output["name"], "parameters": {"binary_data": False}}
                for output in metadata["outputs"]
            ],
        }
        path = tmp_path / "request.json"
        path.write_text(json.dumps(document))
        url = f"{service.url}/v2/models/{name}/versions/1/infer"
        found = json.loads(curl(url, "--data-binary", f"@{path}"))
        assert [o["name"] for o in found["outputs"]] == [o["name"] for o in metadata["outputs"]]
        for output, described in zip(found["outputs"], metadata["outputs"], strict=True):
            assert output["datatype"] == described["datatype"]
            assert len(output["shape"]) == len(described["shape"])
        after = get(f"/models/{name}/versions/1/stats")["model_stats"][0]
        assert after["inference_count"] - before["inference_count"] == 2
        success = [item["inference_stats"]["success"] for item in (before, after)]
        assert success[1]["count"] - success[0]["count"] == 1
        assert success[1]["ns"] > success[0]["ns"]
