"""Image files on disk: the search for images and the writing of results."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from models.types import Struct

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SUFFIX_BY_MEDIA_TYPE = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp"}


class ImageFile(Struct):
    """An image file and the unique name under which its results are written."""

    path: Path
    name: str


def find_images(paths: Iterable[Path]) -> list[ImageFile]:
    """List the image files that the paths stand for, each once, in the given order.

    A folder stands for the files in it and its subfolders that have the suffix of an image, sorted
    by path. A file stands for itself whatever its suffix, so that a wrong one is reported.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _images_below(path) if path.is_dir() else (path,):
            found.setdefault(file.resolve(), file)
    taken: set[str] = set()
    images = []
    for file in found.values():
        # Names are compared without case, because some file systems do so.
        candidates = (file.stem, file.name, *(f"{file.stem}-{n}" for n in range(2, len(taken) + 3)))
        name = next(name for name in candidates if name.casefold() not in taken)
        taken.add(name.casefold())
        images.append(ImageFile(path=file, name=name))
    return images


def _images_below(folder: Path) -> Iterator[Path]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return (path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)


def write_result(
    result: Mapping[str, Any], *, name: str, folder: Path, options: Mapping[str, Any]
) -> list[Path]:
    """Write each overlay as `NAME.METHOD.CLASS.jpg` and everything else as `NAME.json`.

    In the JSON an overlay has the name of its file, as `file`, instead of its base64 `data`. File
    names include the layer if several layers are explained. The JSON is written last, and at once:
    where it is, the result is whole.

    Returns:
        The paths of the overlays.
    """
    explanations = result.get("explanations", [])
    several_layers = len({explanation["layer"] for explanation in explanations}) > 1
    paths: list[Path] = []
    described = []
    for explanation in explanations:
        target, overlay = explanation["target"], dict(explanation["overlay"])
        parts = [name, explanation["method"]]
        if several_layers:
            parts.append(slug(explanation["layer"]))
        parts.append(slug(str(target.get("label") or target["class_id"])))
        suffix = SUFFIX_BY_MEDIA_TYPE[overlay["media_type"]]
        path = _free_path(folder, ".".join(parts), suffix, taken=paths)
        path.write_bytes(base64.b64decode(overlay.pop("data")))
        paths.append(path)
        described.append({**explanation, "overlay": {**overlay, "file": path.name}})
    whole = {**result, "explanations": described, "options": options}
    text = json.dumps(whole, indent=2, ensure_ascii=False)
    unfinished = folder / f"{name}.json.part"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(folder / f"{name}.json")
    return paths


def slug(text: str) -> str:
    """Turn a label or layer name into a part of a file name: `Egyptian cat` → `Egyptian_cat`."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or "_"


def _free_path(folder: Path, stem: str, suffix: str, *, taken: list[Path]) -> Path:
    """The path of this name, or with a number: two targets may have the same label."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for name in names if (path := folder / f"{name}{suffix}") not in taken)
