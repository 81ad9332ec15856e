"""The reference pages of the documentation, made from the code.

python -m tools.reference          # write docs/reference/*.md
python -m tools.reference --check  # exit with 1 if one of them is out of date
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.main import get_command

from models import errors
from models.catalog import ModelSpec, PreprocessSpec
from models.methods import METHODS
from service.api.errors import CLIENT_GONE, CODES
from service.api.metrics import Metrics
from service.api.options import (
    CompareOptions,
    ExplainOptions,
    FeaturesOptions,
    PredictOptions,
    properties,
)
from service.cli.main import app
from service.settings import Settings
from service.worker.local import LocalPool

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
COSTS = {
    "pass": "none",
    "head": "the head, once for each class",
    "passes": "a few passes",
    "many": "hundreds of passes",
}
_OPERATIONS: Mapping[str, type[BaseModel]] = {
    "predict": PredictOptions,
    "explain": ExplainOptions,
    "features": FeaturesOptions,
    "compare": CompareOptions,
}


def options_page() -> str:
    """Every option of the API, with the operations that take it."""
    rows: dict[str, dict[str, Any]] = {}
    for operation, model in _OPERATIONS.items():
        for name, schema in properties(model).items():
            row = rows.setdefault(name, {"schema": schema, "operations": [], "defaults": {}})
            row["operations"].append(operation)
            row["defaults"][operation] = _code(schema.get("default"))
    table = _table(
        ("option", "operations", "type", "default", "meaning"),
        (
            (
                f"`{name}`",
                ", ".join(row["operations"]),
                _type_of(row["schema"]),
                _defaults(row["defaults"]),
                row["schema"].get("description", ""),
            )
            for name, row in rows.items()
        ),
    )
    return _page(
        "Options",
        "Options are query parameters (lists by comma, or repeated), a form part `options` that holds "
        "JSON, or keys beside `images` in a JSON body. `GET /openapi.json` has the same as a schema.",
        table,
    )


def errors_page() -> str:
    """Every error code with its status and meaning."""
    by_code = {kind.code: kind for kind in _subclasses(errors.HeatlensError)}
    rows = []
    for status, codes in CODES.items():
        for code in codes:
            kind = by_code[code]
            meaning = (inspect.getdoc(kind) or "").split("\n")[0]
            shown = "log only" if status == CLIENT_GONE else str(status)
            rows.append((f"`{code}`", shown, "yes" if kind.retryable else "", meaning))
    table = _table(("code", "status", "retryable", "meaning"), rows)
    return _page(
        "Errors",
        'Every error is `{"error": text, "code": code, "request_id": id, "retryable": bool, "field": '
        "option?}`. Program against `code`; texts may change. Retryable ones carry `Retry-After`.",
        table,
    )


def methods_page() -> str:
    """Every method, in the order of `/v1/methods`."""
    rows = []
    for row in METHODS.values():
        defaults = ", ".join(f"{name} {value}" for name, value in row.defaults.items())
        rows.append(
            (
                f"`{row.name}`",
                row.family,
                row.formula,
                row.paper,
                "yes" if row.signed else "",
                COSTS[row.cost],
                defaults,
            )
        )
    header = (
        "method",
        "family",
        "formula",
        "paper",
        "signed",
        "cost beyond the prediction",
        "defaults",
    )
    return _page(
        "Methods",
        "A is the feature maps of a layer, g the gradient of the class's score there. The model card "
        "says which methods can explain a model, and why the others cannot. [Methods](../methods.md) "
        "shows what they draw and how faithful they are.",
        _table(header, rows),
    )


def metrics_page() -> str:
    """Every metric of `/metrics`."""
    metrics = Metrics(LocalPool(Settings()))
    rows = [(f"`{item.name}`", item.type, item.documentation) for item in metrics.collect()]
    return _page(
        "Metrics",
        "`GET /metrics` answers in Prometheus's format for all HTTP processes together; counters end "
        "in `_total`. Dashboards, alerts and recording rules are in `deploy/`.",
        _table(("metric", "type", "meaning"), sorted(rows)),
    )


def settings_page() -> str:
    """Every setting, by section."""
    parts = [_section("Before all sections", Settings, only=("default_model", "base_dir"))]
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts.append(_section(f"[{name}]", field.annotation))
    parts.append(_section("[[models]]", ModelSpec))
    parts.append(_section("[models.preprocess]", PreprocessSpec))
    return _page(
        "Settings",
        "From a TOML file (`heatlens serve --config heatlens.toml`), or the environment "
        "(`HEATLENS_LIMITS__MAX_IMAGES=8`; lists by comma or as JSON). The command line wins over the "
        "environment, the environment over the file. `heatlens check heatlens.toml` tests a file.",
        "\n\n".join(parts),
    )


def commands_page() -> str:
    """Every command with its options."""
    group = get_command(app)
    parts = []
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        rows = []
        for parameter in command.params:
            if getattr(parameter, "hidden", False) or parameter.name == "help":
                continue
            names = ", ".join(f"`{option}`" for option in parameter.opts)
            if parameter.param_type_name == "argument":
                names = f"`{parameter.metavar or parameter.name}`"
            rows.append((names, getattr(parameter, "help", "") or ""))
        text = inspect.cleandoc(command.help or "")
        parts.append(f"## heatlens {name}\n\n{text}\n\n{_table(('option', 'meaning'), rows)}")
    return _page(
        "Commands",
        "`heatlens --install-completion` completes commands, options and methods in the shell. "
        "`NO_COLOR=1` prints without colours. With `--json` results are lines of JSON on standard "
        "output, and messages stay on standard error; `serve` writes its log as JSON lines anyway.\n\n"
        "| exit code | meaning |\n| --- | --- |\n| 0 | all is well |\n"
        "| 1 | something failed; it is named |\n"
        "| 2 | the command or the configuration is wrong |\n"
        "| 3 | the service cannot be reached |\n"
        "| 130 | interrupted |",
        "\n\n".join(parts),
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "commands.md": commands_page,
    "errors.md": errors_page,
    "methods.md": methods_page,
    "metrics.md": metrics_page,
    "options.md": options_page,
    "settings.md": settings_page,
}


def main(
    *, check: Annotated[bool, typer.Option("--check", help="Write nothing; compare.")] = False
) -> None:
    """Write the pages, or compare them with what is written."""
    stale = []
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        typer.echo(f"out of date: {', '.join(stale)}; run python -m tools.reference", err=True)
        raise typer.Exit(1)


def _section(title: str, model: type[BaseModel], *, only: Sequence[str] = ()) -> str:
    """A table of the fields of a section, with the meanings of its docstring."""
    meanings = _attributes(inspect.getdoc(model) or "")
    rows = (
        (
            f"`{name}`",
            _code(None if field.default is PydanticUndefined else field.default),
            meanings.get(name) or field.description or "",
        )
        for name, field in model.model_fields.items()
        if not only or name in only
    )
    return f"## {title}\n\n{_table(('key', 'default', 'meaning'), rows)}"


def _attributes(docstring: str) -> dict[str, str]:
    """The meanings under `Attributes:` of a docstring, by name."""
    block = docstring.partition("Attributes:\n")[2]
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        if found := re.match(r"^    ([a-z0-9_, ]+): (.*)$", line):
            names = [name.strip() for name in found[1].split(",")]
            meanings |= dict.fromkeys(names, found[2])
        elif line.startswith("        ") and names:
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
    return meanings


def _defaults(by_operation: Mapping[str, str]) -> str:
    """One default, or those of each operation where they differ."""
    if len(set(by_operation.values())) == 1:
        return next(iter(by_operation.values()))
    return ", ".join(f"{operation}: {value}" for operation, value in by_operation.items())


def _type_of(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "enum" in schema:
        return "one of " + ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        kinds = (_type_of(item) for item in schema["anyOf"] if item.get("type") != "null")
        return " or ".join(dict.fromkeys(kinds))
    if schema.get("type") == "array":
        items = schema.get("items", {})
        # The names of methods have a page of their own.
        inner = "names" if len(items.get("enum", ())) > 12 else _type_of(items)
        return f"list of {inner}"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum")
    span = f", {low} to {high}" if low is not None and high is not None else ""
    names = {"string": "text", "boolean": "true or false"}
    kind = schema.get("type", "object")
    return f"{names.get(kind, kind)}{span}"


def _code(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, list | tuple):
        return "`[]`" if not value else ", ".join(f"`{item}`" for item in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _subclasses(kind: type[Any]) -> Iterable[type[Any]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---"] * len(names), *(list(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _page(title: str, lead: str, body: str) -> str:
    note = "<!-- Made by python -m tools.reference; do not edit. -->"
    return f"{note}\n\n# {title}\n\n{lead}\n\n{body}\n"


if __name__ == "__main__":
    typer.run(main)
