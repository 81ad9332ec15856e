"""What the commands share: their common options, exit codes, errors and the progress bar."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.errors import HeatlensError, UnknownModel
from models.methods import METHODS
from service.configuration import ConfigurationError, load_settings
from service.settings import Settings

if TYPE_CHECKING:
    from heatlens import APIError, AsyncClient, ModelCard
    from models.catalog import ModelSpec
    from models.types import ModelInfo

EXIT_SOME_FAILED = 1
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

FLAG_BY_OPTION = {
    "methods": "--method",
    "targets": "--target",
    "layers": "--layer",
    "labels": "--label",
}
"""Flags with another name than the option of the API that they set."""

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", exists=True, dir_okay=False, help="TOML file. [default: built-in model]"
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Use a running service instead of loading the model into this process. "
        "A key is read from HEATLENS_API_KEY.",
    ),
]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Name or name@version of a model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text.")]


def complete_method(incomplete: str) -> list[str]:
    """The names of methods that a shell completes."""
    return [name for name in METHODS if name.startswith(incomplete)]


def print_json(value: object) -> None:
    """Print a value as one line of JSON."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def given(**values: object) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def read_settings(config: Path | None) -> Settings:
    """Read the configuration; a wrong one ends the command."""
    try:
        return load_settings(config)
    except ConfigurationError as error:
        raise wrong_configuration(error) from None


def wrong_configuration(error: ConfigurationError) -> typer.BadParameter:
    """An error of the command line about the configuration."""
    return typer.BadParameter(str(error), param_hint="configuration")


def bad_parameter(error: HeatlensError | APIError) -> typer.BadParameter:
    """Turn an error of the API into one about the flag that sets its field."""
    if error.field is None:
        return typer.BadParameter(error.message)
    option = error.field.split(".")[0]
    return typer.BadParameter(error.message, param_hint=FLAG_BY_OPTION.get(option, f"--{option}"))


@contextlib.asynccontextmanager
async def open_client(
    server: str | None, *, config: Path | None, model: str | None
) -> AsyncIterator[AsyncClient]:
    """A client of a running service, or of the service in this process with one model.

    Raises:
        HeatlensError: the model is not configured, or cannot be loaded.
    """
    if server is not None:
        from heatlens import AsyncClient

        async with AsyncClient(server, timeout_s=3600.0) as client:
            yield client
        return
    from heatlens.local import serving

    async with serving(_with_one_model(read_settings(config), model)) as client:
        yield client


async def card_of(client: AsyncClient, reference: str | None) -> ModelCard:
    """The card of `name` or `name@version`, or of the default model.

    Raises:
        UnknownModel: there is none.
    """
    cards = await client.models()
    name, _, version = (reference or cards[0].name).partition("@")
    matching = [card for card in cards if card.name == name and version in {"", card.version}]
    if not matching:
        raise _unknown_model(cards)
    return next((card for card in matching if card.ready), matching[0])


async def load_models(settings: Settings) -> Sequence[ModelInfo]:
    """Load every configured model into this process once; broken ones have a reason."""
    from service.worker.local import LocalPool

    pool = LocalPool(settings)
    await pool.start()
    try:
        await pool.wait_loaded()
        return pool.models()
    finally:
        await pool.close()


def _unknown_model(known: Iterable[ModelCard | ModelSpec]) -> UnknownModel:
    names = ", ".join(f"{model.name}@{model.version}" for model in known)
    return UnknownModel(f"The model is not configured. Known are: {names}.", field="model")


def _with_one_model(settings: Settings, reference: str | None) -> Settings:
    name, _, version = (reference or settings.default_model).partition("@")
    specs = [s for s in settings.models if s.name == name and version in {"", s.version}]
    if not specs:
        raise _unknown_model(settings.models)
    return settings.model_copy(update={"models": specs, "default_model": name})


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """End the command with a sentence on what to change, in place of a traceback."""
    import heatlens

    try:
        yield
    except (HeatlensError, heatlens.APIError) as error:
        raise bad_parameter(error) from None
    except heatlens.ConnectionFailed as error:
        typer.echo(f"{error}\nIs the service running? Start it with: heatlens serve", err=True)
        raise typer.Exit(EXIT_UNREACHABLE) from None


def progress_bar() -> Progress:
    """A progress bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
