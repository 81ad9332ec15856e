"""`heatlens models`, `heatlens check` and `heatlens layers`: what is known of a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

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
from service.cli.tables import layers_table, models_list
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
        Console().print(layers_table(found))


def _report(config: Path | None, *, as_json: bool) -> None:
    settings = read_settings(config)
    with Console(stderr=True).status("loading the models"):
        cards = [info.card for info in asyncio.run(load_models(settings))]
    if as_json:
        for card in cards:
            print_json(msgspec.to_builtins(card))
    else:
        Console().print(models_list(cards, default=settings.default_model))
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
