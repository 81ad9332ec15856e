"""The documentation of methods says what METHODS says."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.methods_table import BEGIN, END, methods_table, with_table
from benchmarks.quality import END as QUALITY_END
from benchmarks.quality import START as QUALITY_START
from models.methods import METHODS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def test_the_document_holds_the_table_of_methods() -> None:
    text = DOCUMENT.read_text()
    assert with_table(text) == text, "run: python -m benchmarks.methods_table docs/methods.md"


def test_there_is_a_row_for_each_method() -> None:
    header, _, *rows = methods_table().splitlines()
    assert [row.split("`")[1] for row in rows] == list(METHODS)
    columns = re.split(r"(?<!\\)\|", header)
    assert all(len(re.split(r"(?<!\\)\|", row)) == len(columns) for row in rows)


def test_only_what_lies_between_the_markers_is_replaced() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter"
    found = with_table(document)
    assert found.startswith(f"before\n{BEGIN}\n| method |")
    assert found.endswith(f"|\n{END}\nafter")
    assert "old" not in found


def test_the_document_has_a_place_for_the_table_of_quality() -> None:
    text = DOCUMENT.read_text()
    assert text.count(QUALITY_START) == text.count(QUALITY_END) == 1
    assert text.index(QUALITY_START) < text.index(QUALITY_END)


def test_pictures_of_the_document_exist() -> None:
    pictures = re.findall(r"\]\((images/[^)]*)\)", DOCUMENT.read_text())
    assert len(pictures) == 2
    for picture in pictures:
        assert (DOCUMENT.parent / picture).stat().st_size < 300_000
