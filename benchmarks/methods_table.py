"""The table of methods in the documentation, made from METHODS.

python -m benchmarks.methods_table              # print it
python -m benchmarks.methods_table docs/methods.md   # put it between the markers there
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from models.methods import METHODS
from models.methods.table import Method

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
COSTS = {
    "pass": "none",
    "head": "head, for each class",
    "passes": "a few passes",
    "many": "hundreds of passes",
}


def methods_table(methods: Sequence[Method] = tuple(METHODS.values())) -> str:
    """One row for each method, in the order of `/v1/methods`."""
    lines = [
        "| method | family | formula | paper | signed | cost beyond the prediction | defaults |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in methods:
        defaults = ", ".join(f"{name} {value}" for name, value in row.defaults.items())
        formula = row.formula.replace("|", "\\|")
        cells = [f"`{row.name}`", row.family, formula, row.paper, "yes" if row.signed else ""]
        lines.append("| " + " | ".join([*cells, COSTS[row.cost], defaults]) + " |")
    return "\n".join(lines)


def with_table(document: str) -> str:
    """The document with the table between its markers."""
    block = f"{BEGIN}\n{methods_table()}\n{END}"
    return re.sub(f"{BEGIN}.*{END}", lambda _: block, document, flags=re.DOTALL)


def main(
    document: Annotated[Path | None, typer.Argument(help="Document with markers.")] = None,
) -> None:
    """Print the table, or put it into a document."""
    if document is None:
        typer.echo(methods_table())
    else:
        document.write_text(with_table(document.read_text()))


if __name__ == "__main__":
    typer.run(main)
