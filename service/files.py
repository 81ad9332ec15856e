"""Pictures on disk for the command line: which files are meant, and what their results are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from models.types import Struct

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class PictureFile(Struct):
    """A file to explain and the name, unique among its fellows, under which its results are written."""

    path: Path
    name: str


def find_pictures(paths: Iterable[Path]) -> list[PictureFile]:
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
        pictures.append(PictureFile(path=file, name=name))
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
