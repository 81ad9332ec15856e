"""`heatlens init`: a configuration for a checkpoint or a saved folder, from what is found in it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console

from service.cli.common import (
    EXIT_SOME_FAILED,
    AsJson,
    load_models,
    print_json,
    reported_errors,
    wrong_configuration,
)
from service.cli.platforms import CONFIG_NAME, model_in, source_of
from service.configuration import ConfigurationError
from service.settings import Settings

if TYPE_CHECKING:
    from models.types import ModelCard


def init(
    model: Annotated[
        Path,
        typer.Argument(
            exists=True,
            metavar="MODEL",
            help="A checkpoint (.safetensors, .pth, .pt), an export (.pt2), a graph (.onnx), or a "
            "folder saved by transformers or timm.",
        ),
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", dir_okay=False, help="[default: heatlens.toml beside MODEL]"
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Where the architecture comes from, if it is not found: timm:resnet50, …"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the model afterwards.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look into a checkpoint or a saved folder, and write a commented configuration for it.

    The model is loaded as the service would load it, so that the file holds what was found out, and
    says what had to be assumed.

    For example:

    - `heatlens init weights/defects.safetensors`
    - `heatlens init weights/defects.pth --source timm:resnet50 --serve`
    """
    folder = model if model.is_dir() else model.parent
    written = output or folder / CONFIG_NAME
    if written.exists() and not force:
        raise typer.BadParameter(f"{written} exists; --force overwrites it.", param_hint="--output")
    entry = _entry(model, source=source, name=name)
    settings = Settings.model_validate(
        {"models": [entry], "base_dir": folder.resolve(), "server": {"devices": ["cpu"]}}
    )
    with reported_errors(), Console(stderr=True).status("loading the model"):
        card = asyncio.run(load_models(settings))[0].card
    if not card.ready:
        typer.echo(f"{model} could not be loaded: {card.reason}", err=True)
        if card.cause:
            typer.echo(f"Cause: {card.cause}", err=True)
        if source is None:
            typer.echo("Name the architecture with --source, such as timm:resnet50.", err=True)
        raise typer.Exit(EXIT_SOME_FAILED)
    written.write_text(_configuration(entry, card), encoding="utf-8")
    if as_json:
        print_json({"config": str(written), "model": msgspec.to_builtins(card)})
    else:
        typer.echo(f"written to {written}; check it with: heatlens check {written}")
        for note in card.notes:
            typer.echo(f"note: {note}")
    if serve:
        from service.cli.main import app

        app(["serve", "--config", str(written)])


def _entry(model: Path, *, source: str | None, name: str | None) -> dict[str, Any]:
    try:
        entry = model_in(model) if model.is_dir() else {"source": source_of(model)}
    except ConfigurationError as error:
        raise wrong_configuration(error) from None
    if source is not None:
        entry |= {"source": source, "weights": model.name}
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model.resolve().stem).lstrip("._-")
    return {**entry, "name": name or stem or "model"}


def _configuration(entry: dict[str, Any], card: ModelCard) -> str:
    """The file: the entry as it was loaded, and what was found, as comments to be changed."""
    lines = ["# Written by heatlens init. Lines that begin with # show what was found.", ""]
    lines += [f"# {note}" for note in card.notes]
    lines += ["[[models]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    lines += [f"# num_classes = {card.num_classes}", f'# task = "{card.task}"']
    if "labels" not in entry:
        lines.append('# labels = "labels.txt"              # one name a line')
    lines.append(f'# target_layer = "{card.target_layer or "auto"}"')
    if card.input is not None:
        height, width = card.input.crop
        lines += [
            "",
            "# [models.preprocess]                  # as the network was trained",
            f"# crop = {height if height == width else [height, width]}",
            f'# interpolation = "{card.input.interpolation}"',
            f"# mean = {[round(value, 6) for value in card.input.mean]}",
            f"# std = {[round(value, 6) for value in card.input.std]}",
        ]
    return "\n".join(lines) + "\n"
