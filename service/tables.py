"""What the command line prints: predictions, failures, models."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from models.types import ModelCard
from service.offline import Explained, Failed


def predictions_table(reports: Iterable[Explained]) -> Table:
    """One row for each picture: its most probable classes and the overlays written."""
    table = Table("picture", "prediction", "probability", "written")
    for report in reports:
        first, *others = report.result["predictions"]
        runner_up = (
            f" [dim]({escape(others[0]['label'])} {others[0]['probability']:.1%})[/]"
            if others
            else ""
        )
        table.add_row(
            escape(str(report.picture.path)),
            escape(first["label"]) + runner_up,
            f"{first['probability']:.1%}",
            "\n".join(escape(str(path)) for path in report.overlays),
        )
    return table


def failures_table(reports: Iterable[Failed]) -> Table:
    """One row for each picture that could not be explained."""
    table = Table("picture", "code", "reason", title="failed", title_style="bold red")
    for report in reports:
        table.add_row(escape(str(report.picture.path)), report.code, escape(report.message))
    return table


def models_table(cards: Iterable[ModelCard], *, default: str) -> Table:
    """One row for each model version; an unavailable one says why."""
    table = Table(
        "model",
        "state",
        "source",
        "classes",
        "input",
        "target layer",
        "head",
        "methods",
        "best batch",
    )
    for card in cards:
        name = f"{card.name}@{card.version}"
        state = (
            "[green]ready[/]"
            if card.ready
            else f"[red]{card.state}[/]: {escape(card.reason or '')}"
        )
        height, width = card.input.crop if card.input else (0, 0)
        table.add_row(
            f"[bold]{escape(name)}[/] (default)" if card.name == default else escape(name),
            state,
            escape(card.source),
            str(card.num_classes or ""),
            f"{width} x {height}" if card.input else "",
            escape(card.target_layer or ""),
            card.head or "",
            ", ".join(row.name for row in card.methods if row.applicable),
            str(card.best_batch) if card.ready else "",
        )
    return table
