"""Lists of predictions, failures and models for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from models.types import ModelCard

if TYPE_CHECKING:
    from heatlens.results import Layer
    from service.cli.explaining import Explained, Failed


def predictions_list(reports: Iterable[Explained]) -> Text:
    """Each image with its two most probable classes and its overlays.

    Every file name is a line of its own, so that narrow terminals do not break it.
    """
    text = Text()
    for report in reports:
        classes = report.result["predictions"][:2]
        text.append(f"{report.image.path}\n", "bold")
        text.append("  " + ", ".join(f"{c['label']} {c['probability']:.1%}" for c in classes))
        for path in report.overlays:
            text.append(f"\n  {path.name}", "dim")
        text.append("\n")
    return text


def failures_list(reports: Iterable[Failed]) -> Text:
    """Each image that could not be explained, with the reason."""
    text = Text()
    for report in reports:
        text.append(f"{report.image.path}\n", "bold red")
        text.append(f"  {report.code}: {report.message}\n")
    return text


def layers_table(layers: Sequence[Layer]) -> Table:
    """A row for each layer; the recommended one stands out, and others say why they have no map."""
    table = Table("layer", "type", "output", Column("parameters", justify="right"), "map", box=None)
    for layer in layers:
        depth = layer.name.count(".")
        has_map = "recommended" if layer.recommended else "yes" if layer.spatial else layer.reason
        table.add_row(
            Text(" " * depth + layer.name),
            layer.type,
            " x ".join(map(str, layer.output_shape or ())),
            f"{layer.parameters:,}" if layer.parameters else "",
            Text(has_map or "no"),
            style="bold green" if layer.recommended else "" if layer.spatial else "dim",
        )
    return table


def models_list(cards: Sequence[ModelCard], *, default: str) -> RenderableType:
    """A block for each model version; an unavailable one has its reason."""
    return Group(*(_model_block(card, is_default=card.name == default) for card in cards))


def _model_block(card: ModelCard, *, is_default: bool) -> Table:
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
    """The rows of a model by label; unknown values are empty."""
    facts = {"reason": card.reason or "", "cause": card.cause or "", "source": card.source}
    if not card.ready:
        return facts
    crop = card.input.crop if card.input else None
    head = f"{card.head}, closed form" if card.closed_form else card.head
    impossible = (f"{row.name}: {row.reason}" for row in card.methods if not row.applicable)
    return facts | {
        "device": ", ".join(card.devices),
        "precision": card.precision,
        "classes": f"{card.num_classes}, {card.task}",
        "input": f"{crop[1]} x {crop[0]}" if crop else "",
        "target layer": card.target_layer or "none",
        "head": head or "",
        "notes": "\n".join(card.notes),
        "methods": ", ".join(row.name for row in card.methods if row.applicable),
        "not possible": "\n".join(impossible),
        "best batch": str(card.best_batch),
        "latency": ", ".join(f"{n}: {ms:.1f} ms" for n, ms in card.latency_ms.items()),
    }
