"""Labelled images: folders named by class, or a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.types import Struct
from service.cli.files import find_images

_FILE, _LABEL, _BOX = (
    ("file", "path", "image"),
    ("class_id", "label", "class"),
    ("x", "y", "width", "height"),
)


class DatasetError(ValueError):
    """The images or their labels cannot be used; the text says what to change."""


class LabelledImage(Struct):
    """An image with its class.

    Attributes:
        class_id: index of the class.
        box: (x, y, width, height) of the object in pixels of the image, if known.
    """

    path: Path
    class_id: int
    box: tuple[float, float, float, float] | None = None


def read_dataset(folder: Path, table: Path | None, labels: Sequence[str]) -> list[LabelledImage]:
    """Read the images of a folder and their classes.

    A table is a CSV file with a header: `file` (relative to the folder), `label` or `class_id`, and
    `x,y,width,height` of a box, if there are boxes; None looks for `labels.csv` in the folder. Without
    a table, each folder of images is named by a class. Classes are given by their label, without
    regard to case, or by their index.

    Raises:
        DatasetError: no images, an unknown class, a missing column or file.
    """
    classes = {str(index): index for index in range(len(labels))}
    classes |= {label.casefold(): index for index, label in reversed(list(enumerate(labels)))}
    found = folder / "labels.csv"
    if table is None and found.is_file():
        table = found
    images = (
        _from_folders(folder, classes) if table is None else _from_table(folder, table, classes)
    )
    if not images:
        raise DatasetError(
            f"{folder} has no labelled images: put them into one folder for each class, or list "
            "them in labels.csv with the columns file and label."
        )
    return images


def _from_folders(folder: Path, classes: Mapping[str, int]) -> list[LabelledImage]:
    images = []
    for file in find_images([folder]):
        name = file.path.relative_to(folder).parts[0]
        if file.path.parent == folder:
            raise DatasetError(
                f"{file.path.name} lies beside the folders of the classes; its class is unknown."
            )
        images.append(
            LabelledImage(path=file.path, class_id=_class_of(name, classes, str(folder / name)))
        )
    return images


def _from_table(folder: Path, table: Path, classes: Mapping[str, int]) -> list[LabelledImage]:
    with table.open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictReader(stream)
        columns = rows.fieldnames or []
        file = next((name for name in _FILE if name in columns), None)
        label = next((name for name in _LABEL if name in columns), None)
        if file is None or label is None:
            raise DatasetError(
                f"{table} needs the columns file and label; it has {', '.join(columns)}."
            )
        images = []
        for row in rows:
            where = f"{table}:{rows.line_num}"
            path = folder / row[file]
            if not path.is_file():
                raise DatasetError(f"{where}: {row[file]} is not a file in {folder}.")
            class_id = _class_of(row[label], classes, where)
            images.append(LabelledImage(path=path, class_id=class_id, box=_box_of(row, where)))
    return images


def _class_of(name: str, classes: Mapping[str, int], where: str) -> int:
    class_id = classes.get(
        name.strip().casefold(), classes.get(name.strip().replace("_", " ").casefold())
    )
    if class_id is None:
        known = sorted(key for key in classes if not key.isdigit())[:5]
        raise DatasetError(
            f"{where}: the model has no class {name!r}. Its classes are {', '.join(known)}, … or "
            f"indices from 0 to {max(classes.values())}."
        )
    return class_id


def _box_of(row: Mapping[str, str], where: str) -> tuple[float, float, float, float] | None:
    values = [row.get(name, "") or "" for name in _BOX]
    if not any(values):
        return None
    try:
        x, y, width, height = map(float, values)
    except ValueError:
        raise DatasetError(f"{where}: a box is four numbers: x, y, width, height.") from None
    return x, y, width, height
