"""The notebook runs from its first cell to its last, and shows pictures."""

from __future__ import annotations

import json

import pytest

from tests.examples.running import EXAMPLES, python

NOTEBOOK = EXAMPLES / "notebook.ipynb"

# What a kernel does with the last expression of a cell, in short.
KERNEL = """
import ast, json, pathlib, sys
names, shown = {}, []
for cell in json.loads(pathlib.Path(sys.argv[1]).read_text())["cells"]:
    if cell["cell_type"] == "code":
        tree = ast.parse("".join(cell["source"]))
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(last, "cell", "eval"), names)
            html, png = (getattr(value, f"_repr_{kind}_", None) for kind in ("html", "png"))
            shown.append(html() if html else f"PNG {len(png())}" if png else repr(value))
print("\\n".join(shown))
"""


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(300)
def test_the_notebook_runs() -> None:
    shown = python("-W", "error", "-c", KERNEL, NOTEBOOK, cwd=EXAMPLES)
    assert shown.count("<img") == 2, "two methods, two pictures"
    assert shown.count("PNG ") == 2, "the contrast and the channels"
    assert "score left on average" in shown


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
