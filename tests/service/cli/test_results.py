"""What the command line writes for one answer."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from service.cli.files import write_result


def explanation(method: str, layer: str, label: str, picture: bytes) -> dict[str, Any]:
    return {
        "method": method,
        "layer": layer,
        "target": {"class_id": 1, "label": label, "score": 2.0, "probability": 0.5},
        "overlay": {
            "media_type": "image/jpeg",
            "width": 8,
            "height": 6,
            "data": base64.b64encode(picture).decode(),
        },
    }


def result(*explanations: dict[str, Any]) -> dict[str, Any]:
    return {"image": {"width": 8, "height": 6}, "explanations": list(explanations)}


def test_overlays_and_numbers(tmp_path: Path) -> None:
    answer = result(
        explanation("gradcam", "bn2", "Egyptian cat", b"one"),
        explanation("layercam", "bn2", "tabby", b"two"),
    )
    overlays = write_result(answer, name="cat", folder=tmp_path)
    assert [path.name for path in overlays] == [
        "cat.gradcam.Egyptian_cat.jpg",
        "cat.layercam.tabby.jpg",
    ]
    assert [path.read_bytes() for path in overlays] == [b"one", b"two"]
    written = json.loads((tmp_path / "cat.json").read_text())
    assert written["image"] == answer["image"]
    assert written["explanations"][1]["target"]["label"] == "tabby"
    assert written["explanations"][1]["overlay"] == {
        "media_type": "image/jpeg",
        "width": 8,
        "height": 6,
        "file": "cat.layercam.tabby.jpg",
    }


def test_layers_are_told_apart(tmp_path: Path) -> None:
    answer = result(
        *(explanation("gradcam", layer, "cat", b"x") for layer in ("layer3", "layer4.1"))
    )
    names = [path.name for path in write_result(answer, name="a", folder=tmp_path)]
    assert names == ["a.gradcam.layer3.cat.jpg", "a.gradcam.layer4.1.cat.jpg"]


def test_one_label_twice_is_two_files(tmp_path: Path) -> None:
    answer = result(*(explanation("gradcam", "bn2", "cat", data) for data in (b"1", b"2")))
    overlays = write_result(answer, name="a", folder=tmp_path)
    assert [path.read_bytes() for path in overlays] == [b"1", b"2"]
