"""The table of docs/bring-your-model.md is what happens.

`python -m tests.models.sources.test_kinds` writes it anew.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed
from models.sources import load
from models.warmup import warm_up
from tests.models.sources.kinds import KINDS

DOCS = Path(__file__).parents[3] / "docs" / "bring-your-model.md"
BEGIN, END = (
    "<!-- the table, made by tests/models/sources/test_kinds.py -->\n",
    "<!-- its end -->\n",
)
NEEDS = {
    "ONNX, for batches of one": "onnxruntime",
    "a folder of transformers": "transformers",
    "the same with an adapter of LoRA": "transformers",
    "the same with another adapter of PEFT": "transformers",
    "a folder of transformers that segments": "transformers",
    "a CLIP of transformers": "transformers",
    "a CLIP of transformers, without labels": "transformers",
    "a CLIP of transformers, with one label": "transformers",
    "a CLIP of transformers, embedding": "transformers",
}
WARMED_UP = ("Outputs", "Networks")
"""Sections whose kinds are tried with every method, too."""
EVERY = [(section, name) for section, kinds in KINDS.items() for name in kinds]


def happens(section: str, name: str, folder: Path) -> str:
    """The row of a kind: what happens, in the words that the operator sees."""
    fields = KINDS[section][name](folder)
    try:
        with warnings.catch_warnings():
            # Of quantisation and TorchScript, whose time is over.
            warnings.simplefilter("ignore")
            loaded = load(ModelSpec(name="m", **fields), folder)
            if section in WARMED_UP:
                warm_up(loaded, torch.device("cpu"), warmup_s=0.0)
    except ModelLoadFailed as error:
        what, sentences = "refused", error.message
    else:
        what = "served with a note" if loaded.notes else "served"
        sentences = " ".join(loaded.notes)
    told = sentences.replace("|", "\\|").replace("\n", "<br>")
    return f"| {name} | {what} | {told} |\n"


def table(rows: dict[tuple[str, str], str]) -> str:
    def lines() -> Iterator[str]:
        for section, kinds in KINDS.items():
            yield f"\n### {section}\n\n| what | happens | in the card or as the reason |\n|---|---|---|\n"
            yield from (rows[section, name] for name in kinds)

    return "".join(lines())


@pytest.mark.parametrize(("section", "name"), EVERY)
def test_what_happens_is_what_the_table_says(section, name, tmp_path):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    row = happens(section, name, tmp_path)
    assert "fails on an input" not in row
    assert row in DOCS.read_text(), f"run python -m {__name__}; this row is new: {row}"


def test_the_table_has_these_kinds_alone():
    written = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in written.splitlines()]
    assert [
        name
        for name in rows
        if name not in ("|---|---|---|", "what") and name and not name.startswith("###")
    ] == [name for _, name in EVERY]
    assert len(EVERY) >= 60


if __name__ == "__main__":
    found = {}
    for kind in EVERY:
        with tempfile.TemporaryDirectory() as made:
            found[kind] = happens(*kind, Path(made))
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + BEGIN + table(found) + "\n" + END + rest.partition(END)[2])
