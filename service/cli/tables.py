"""What the command line prints: predictions, failures, models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from models.types import ModelCard
from service.cli.explain import Explained, Failed


def predictions_table(reports: Iterable[Explained]) -> Table:
    """One row for each picture: its most probable class, the runner-up, and the overlays written."""
    table = Table(
        Column("picture", overflow="fold"),
        "prediction",
        "runner-up",
        Column("written", overflow="fold"),
    )
    for report in reports:
        ranks = [
            f"{escape(row['label'])} [dim]{row['probability']:.1%}[/]"
            for row in report.result["predictions"][:2]
        ]
        table.add_row(
            escape(str(report.picture.path)),
            ranks[0],
            "".join(ranks[1:]),
            "\n".join(escape(path.name) for path in report.overlays),
        )
    return table


def failures_table(reports: Iterable[Failed]) -> Table:
    """One row for each picture that could not be explained."""
    picture = Column("picture", overflow="fold")
    table = Table(picture, "code", "reason", title="failed", title_style="bold red")
    for report in reports:
        table.add_row(escape(str(report.picture.path)), report.code, escape(report.message))
    return table


def models_list(cards: Sequence[ModelCard], *, default: str) -> RenderableType:
    """A block for each model version; an unavailable one says why."""
    return Group(*(_block(card, is_default=card.name == default) for card in cards))


def _block(card: ModelCard, *, is_default: bool) -> Table:
    grid = Table.grid(Column(style="dim", min_width=13), Column(overflow="fold"), padding=(0, 2))
    state = f"[green]{card.state}[/]" if card.ready else f"[red]{card.state}[/]"
    name = f"[bold]{escape(card.name)}@{escape(card.version)}[/]"
    grid.add_row("model", f"{name} {state}{' (default)' if is_default else ''}")
    for label, value in _facts(card).items():
        if value:
            grid.add_row(label, escape(value))
    grid.add_row()
    return grid


def _facts(card: ModelCard) -> dict[str, str]:
    """What is known of a model, by label; unknown facts are empty."""
    facts = {"reason": card.reason or "", "cause": card.cause or "", "source": card.source}
    if not card.ready:
        return facts
    crop = card.input.crop if card.input else None
    head = f"{card.head}, closed form" if card.closed_form else card.head
    refused = (f"{row.name}: {row.reason}" for row in card.methods if not row.applicable)
    return facts | {
        "device": ", ".join(card.devices),
        "precision": card.precision,
        "classes": f"{card.num_classes}, {card.task}",
        "input": f"{crop[1]} x {crop[0]}" if crop else "",
        "target layer": card.target_layer or "none",
        "head": head or "",
        "notes": "\n".join(card.notes),
        "methods": ", ".join(row.name for row in card.methods if row.applicable),
        "not possible": "\n".join(refused),
        "best batch": str(card.best_batch),
        "latency": ", ".join(f"{n}: {ms:.1f} ms" for n, ms in card.latency_ms.items()),
    }
