"""Class names from the configuration: a list, a text file or a JSON file. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed


def read_labels(spec: ModelSpec, base_dir: Path) -> tuple[str, ...] | None:
    """Return the class names that the entry configures, by class index; None if it configures none.

    A file holds one name per line, or, if its name ends in `.json`, a list of names or an object
    `{"<index>": "<name>"}`.

    Raises:
        ModelLoadFailed: the file is missing, unreadable or empty, or its indices have gaps.
    """
    if spec.labels is None:
        return None
    labels = spec.labels if isinstance(spec.labels, list) else _from_file(spec.labels, base_dir)
    if not labels or not all(labels):
        raise ModelLoadFailed("The labels are empty, or one of them is.")
    return tuple(labels)


def default_labels(num_classes: int) -> tuple[str, ...]:
    """Return names for classes that nobody named: `class 0`, `class 1` and so on."""
    return tuple(f"class {index}" for index in range(num_classes))


def _from_file(path: Path, base_dir: Path) -> list[str]:
    try:
        text = (base_dir / path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ModelLoadFailed(f"The labels file {path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadFailed(f"The labels file {path} cannot be read as UTF-8 text.") from error
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.strip().splitlines()]
    try:
        return _from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ModelLoadFailed(
            f"The labels file {path} holds neither a JSON list of names nor an object "
            "of names by class index without gaps."
        ) from error


def _from_json(value: object) -> list[str]:
    if isinstance(value, Mapping):
        by_index = {int(index): name for index, name in value.items()}
        value = [by_index.get(index) for index in range(len(value))]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("not a list of names")
    return value
