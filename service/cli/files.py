"""Pictures on disk for the command line: which files are meant, and what their results are called."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from models.types import Struct

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class ImageFile(Struct):
    """A file to explain and the name, unique among its fellows, under which its results are written."""

    path: Path
    name: str


def find_images(paths: Iterable[Path]) -> list[ImageFile]:
    """List the files that are meant, each once, in the order given.

    A folder stands for the pictures in it and below it, by suffix and in order; a file is taken
    whatever it is called, so that a wrong one is reported and not passed over.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _below(path) if path.is_dir() else (path,):
            found.setdefault(file.resolve(), file)
    taken: set[str] = set()
    pictures = []
    for file in found.values():
        name = _free_name(file, taken)
        taken.add(name.casefold())
        pictures.append(ImageFile(path=file, name=name))
    return pictures


def slug(text: str) -> str:
    """Make a label or layer name fit for a file name: `Egyptian cat` → `Egyptian_cat`."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or "_"


def _below(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file())


def _free_name(file: Path, taken: set[str]) -> str:
    """`cat`, or `cat.png` beside a `cat.jpg`, or `cat-2`; some file systems do not tell `Cat` from `cat`."""
    for name in (file.stem, file.name):
        if name.casefold() not in taken:
            return name
    number = 2
    while f"{file.stem}-{number}".casefold() in taken:
        number += 1
    return f"{file.stem}-{number}"


# ---------------------------------------------------------------- results


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
