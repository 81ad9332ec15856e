"""Which files the command line explains, and the files that it writes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from service.cli.files import find_images, slug, write_result


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_a_folder_stands_for_its_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "deep/c.webp", "notes.txt", "d.jpg/e.gif")
    names = [image.path.relative_to(tmp_path).as_posix() for image in find_images([tmp_path])]
    assert names == ["a.png", "b.JPG", "d.jpg/e.gif", "deep/c.webp"]


def test_a_file_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    (odd,) = touch(tmp_path, "image.dat")
    missing = tmp_path / "missing.jpg"
    assert [image.path for image in find_images([odd, missing])] == [odd, missing]


def test_a_file_named_twice_is_taken_once(tmp_path: Path) -> None:
    (file,) = touch(tmp_path, "cat.jpg")
    assert len(find_images([file, tmp_path, tmp_path / "." / "cat.jpg"])) == 1


def test_results_do_not_overwrite_each_other(tmp_path: Path) -> None:
    files = touch(tmp_path, "cat.jpg", "cat.png", "x/cat.jpg", "y/Cat.jpg", "z/cat.jpg")
    names = [image.name for image in find_images(files)]
    assert names == ["cat", "cat.png", "cat.jpg", "Cat-2", "cat-3"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Egyptian cat", "Egyptian_cat"),
        ("../../etc/passwd", "etc_passwd"),
        ("layer4.1", "layer4.1"),
        ("école", "école"),
        ("...", "_"),
    ],
)
def test_slugs(text: str, expected: str) -> None:
    assert slug(text) == expected


# ---------------------------------------------------------------- results


def explanation(method: str, layer: str, label: str, overlay: bytes) -> dict[str, Any]:
    return {
        "method": method,
        "layer": layer,
        "target": {"class_id": 1, "label": label, "score": 2.0, "probability": 0.5},
        "overlay": {
            "media_type": "image/jpeg",
            "width": 8,
            "height": 6,
            "data": base64.b64encode(overlay).decode(),
        },
    }


def result(*explanations: dict[str, Any]) -> dict[str, Any]:
    return {"image": {"width": 8, "height": 6}, "explanations": list(explanations)}


def test_overlays_and_numbers(tmp_path: Path) -> None:
    entry = result(
        explanation("gradcam", "bn2", "Egyptian cat", b"one"),
        explanation("layercam", "bn2", "tabby", b"two"),
    )
    overlays = write_result(entry, name="cat", folder=tmp_path, options={})
    assert [path.name for path in overlays] == [
        "cat.gradcam.Egyptian_cat.jpg",
        "cat.layercam.tabby.jpg",
    ]
    assert [path.read_bytes() for path in overlays] == [b"one", b"two"]
    written = json.loads((tmp_path / "cat.json").read_text())
    assert written["image"] == entry["image"]
    assert written["explanations"][1]["target"]["label"] == "tabby"
    assert written["explanations"][1]["overlay"] == {
        "media_type": "image/jpeg",
        "width": 8,
        "height": 6,
        "file": "cat.layercam.tabby.jpg",
    }


def test_layers_are_told_apart(tmp_path: Path) -> None:
    entry = result(
        *(explanation("gradcam", layer, "cat", b"x") for layer in ("layer3", "layer4.1"))
    )
    names = [path.name for path in write_result(entry, name="a", folder=tmp_path, options={})]
    assert names == ["a.gradcam.layer3.cat.jpg", "a.gradcam.layer4.1.cat.jpg"]


def test_one_label_twice_is_two_files(tmp_path: Path) -> None:
    entry = result(*(explanation("gradcam", "bn2", "cat", data) for data in (b"1", b"2")))
    overlays = write_result(entry, name="a", folder=tmp_path, options={})
    assert [path.read_bytes() for path in overlays] == [b"1", b"2"]
