"""`heatlens models`, `heatlens check` and `heatlens layers`: what is known of a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from models.types import ModelCard
from service.cli.common import (
    EXIT_SOME_FAILED,
    AsJson,
    Config,
    Server,
    card_of,
    load_models,
    open_client,
    print_json,
    read_settings,
    reported_errors,
)
from service.settings import Settings

if TYPE_CHECKING:
    from heatlens.results import Layer


def models(*, config: Config = None, as_json: AsJson = False) -> None:
    """Load and check the configured models and list their properties.

    The exit code is 1 if a model is unavailable; the list gives the reason.

    For example:

    - `heatlens models`
    - `heatlens models --config heatlens.toml`
    """
    _report(config, as_json=as_json)


def check(
    config: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, metavar="CONFIG", help="TOML file.")
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Check a configuration: load every model, and say which line to change.

    Prints what `heatlens models` prints. The exit code is 2 if the file is wrong, and 1 if a model
    cannot be loaded.

    For example:

    - `heatlens check heatlens.toml`
    """
    _report(config, as_json=as_json)


def layers(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Name or name@version.")
    ] = None,
    *,
    config: Config = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """List the layers of a model: their shape, and whether a map can be drawn of them.

    For example:

    - `heatlens layers`
    - `heatlens layers defects --config heatlens.toml --json`
    """

    async def run() -> list[Layer]:
        async with open_client(server, config=config, model=model) as client:
            card = await card_of(client, model)
            return await client.layers(model or card.name)

    with reported_errors(), Console(stderr=True).status("loading the model"):
        found = asyncio.run(run())
    if as_json:
        for layer in found:
            print_json(msgspec.to_builtins(layer))
    else:
        Console().print(_layers_table(found))


def _report(config: Path | None, *, as_json: bool) -> None:
    settings = read_settings(config)
    with Console(stderr=True).status("loading the models"):
        cards = [info.card for info in asyncio.run(load_models(settings))]
    if as_json:
        for card in cards:
            print_json(msgspec.to_builtins(card))
    else:
        Console().print(_models_list(cards, default=settings.default_model))
    broken = [card for card in cards if not card.ready]
    if broken:
        _name_lines(config, settings, broken)
        raise typer.Exit(EXIT_SOME_FAILED)


def _name_lines(config: Path | None, settings: Settings, broken: Sequence[ModelCard]) -> None:
    """Say where in the file the entries of broken models begin."""
    if config is None:
        return
    from service.configuration import line_of

    text = config.read_text(encoding="utf-8")
    entries = [spec.key for spec in settings.models]
    for card in broken:
        line = line_of(text, ("models", entries.index(card.key)))
        if line is not None:
            typer.echo(f"{config}:{line}: {card.name} could not be loaded: {card.reason}", err=True)


def _layers_table(layers: Sequence[Layer]) -> Table:
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


def _models_list(cards: Sequence[ModelCard], *, default: str) -> RenderableType:
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
