"""One picture's answer, in the shape of the wire contract, as files and as rows of a table."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.files import slug

SUFFIX_BY_MEDIA_TYPE = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp"}

Result = Mapping[str, Any]


def write_result(result: Result, *, name: str, folder: Path) -> list[Path]:
    """Write the overlays as `NAME.METHOD.CLASS.jpg` and everything else as `NAME.json`.

    In the JSON the pictures' base64 `data` is replaced by `file`, the name of the file beside it.
    The layer is part of a file name where the answer explains several.

    Args:
        result: an entry of `results` in the answer of `/v1/explain`.
        name: what the files are called.
        folder: an existing folder.

    Returns:
        The overlays written.
    """
    explanations = result.get("explanations", [])
    several = len({explanation["layer"] for explanation in explanations}) > 1
    overlays: list[Path] = []
    described = []
    for explanation in explanations:
        label = explanation["target"].get("label") or explanation["target"]["class_id"]
        parts = [name, explanation["method"], slug(str(label))]
        if several:
            parts.insert(2, slug(explanation["layer"]))
        path, overlay = _write_picture(explanation["overlay"], folder, ".".join(parts), overlays)
        overlays.append(path)
        described.append({**explanation, "overlay": overlay})
    document = {**result, "explanations": described}
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return overlays


def _write_picture(
    picture: Mapping[str, Any], folder: Path, stem: str, taken: list[Path]
) -> tuple[Path, dict[str, Any]]:
    suffix = SUFFIX_BY_MEDIA_TYPE[picture["media_type"]]
    path = folder / f"{stem}{suffix}"
    number = 2
    while path in taken:  # two targets with one label, such as a class and its contrast
        path = folder / f"{stem}-{number}{suffix}"
        number += 1
    path.write_bytes(base64.b64decode(picture["data"]))
    described = {key: value for key, value in picture.items() if key != "data"}
    return path, {**described, "file": path.name}
