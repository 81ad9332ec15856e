"""The command line: `heatlens serve`, `heatlens explain`, `heatlens models`, `heatlens bench`.

Each command imports what it needs when it runs, so that `heatlens --help` is fast.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from models.errors import HeatlensError
from models.imaging.colormaps import Colormap
from models.methods import METHODS
from service.cli.bench.command import bench
from service.cli.files import ImageFile, find_images
from service.cli.tables import failures_list, models_list, predictions_list
from service.configuration import ConfigurationError, load_settings
from service.settings import Settings

if TYPE_CHECKING:
    from service.cli.explain import Explained, Failed

EXIT_SOME_FAILED = 1

FLAG_BY_OPTION = {"methods": "--method", "targets": "--target", "layers": "--layer"}
"""Flags with another name than the option of the API that they set."""


class _ServeByDefault(TyperGroup):
    """Options without a command are those of `serve`, as platforms append them to a container."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for option in self.get_params(ctx) for name in option.opts}
        if args and args[0].startswith("-") and args[0] not in own:
            args = ["serve", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="heatlens",
    cls=_ServeByDefault,
    help="Classify images and show why.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(bench)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", exists=True, dir_okay=False, help="TOML file. [default: built-in model]"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")]


def main() -> None:
    """Run the command line and exit."""
    app(prog_name="heatlens")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"heatlens {metadata.version('heatlens')}")
        raise typer.Exit


@app.callback()
def root(
    *,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Classify images and show why."""


@app.command()
def serve(
    *,
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", "--http_port", min=0, max=65535, help="Port to bind."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="auto, or a list such as cpu or cuda:0,cuda:1.")
    ] = None,
    http_workers: Annotated[
        str | None,
        typer.Option("--http-workers", "--workers", help="HTTP processes: a number or auto."),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    model_dir: Annotated[
        Path | None,
        typer.Option(
            "--model-dir",
            "--model_dir",
            exists=True,
            file_okay=False,
            help="Folder with a heatlens.toml, or with one model. "
            "[default: /mnt/models or /opt/ml/model, where a platform mounts them]",
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option("--model-name", "--model_name", help="Name to serve the model under."),
    ] = None,
    _predictor_host: Annotated[str | None, typer.Option("--predictor_host", hidden=True)] = None,
) -> None:
    """Serve over HTTP until SIGTERM or Ctrl-C.

    Options override the environment (`HEATLENS_SERVER__PORT=9000`), which overrides the file.
    SIGHUP reloads the configuration. `heatlens` followed by options alone serves, too.

    The names with underscores are those that KServe appends; its `--predictor_host` is ignored,
    because an explanation needs the network itself.

    For example:

    - `heatlens serve`
    - `heatlens serve --config heatlens.toml --port 9000 --devices cuda:0,cuda:1`
    """
    server = _given(
        host=host, port=port, devices=devices, http_workers=http_workers, log_level=log_level
    )
    from service.cli.platforms import hosted_configuration, mounted_folder
    from service.logs import configure_logging
    from service.supervisor.supervisor import Supervisor

    try:
        source = hosted_configuration(
            config=config,
            folder=model_dir or mounted_folder(),
            name=model_name,
            server=server,
            environment=os.environ,
        )
        settings = source.read()
    except ConfigurationError as error:
        raise _wrong_configuration(error) from None
    configure_logging(settings.server.log_level)
    raise typer.Exit(Supervisor(settings, source=source).run())


@app.command()
def explain(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, or folders of images.", metavar="IMAGE")
    ],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder for the results.")
    ] = Path("heatlens-out"),
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", metavar="NAME", help=f"May be repeated. One of {', '.join(METHODS)}."
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="Class index, label, or top1 to top10; may be repeated."
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", "-l", metavar="NAME", help="Layer name or glob; may be repeated."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name or name@version of a model.")
    ] = None,
    config: Config = None,
    colormap: Annotated[
        str | None, typer.Option(help=f"auto, or one of {', '.join(get_args(Colormap))}.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Share of the strongest values that may saturate, 0 to 0.1, or auto."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Opacity of the overlay, 0 to 1.")] = None,
    canvas: Annotated[
        str | None, typer.Option(help="input (the crop that the model saw) or original.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain images without a server.

    Writes an overlay `NAME.METHOD.CLASS.jpg` for each method and class, and everything else as
    `NAME.json`. An image that fails does not stop the others, but the exit code is 1.

    For example:

    - `heatlens explain cat.jpg`
    - `heatlens explain photos/ -o out -m gradcam -m layercam -t top1 -t tabby`
    - `heatlens explain cat.jpg --canvas original --colormap viridis --json`
    """
    options = _given(
        methods=method,
        targets=target,
        layers=layer,
        model=model,
        colormap=colormap,
        clip=clip,
        alpha=alpha,
        canvas=canvas,
    )
    files = find_images(images)
    if not files:
        raise typer.BadParameter("There are no images in these folders.", param_hint="IMAGE")
    settings = _settings(config)
    output.mkdir(parents=True, exist_ok=True)
    try:
        explained, failed = asyncio.run(
            _explain(files, options=options, settings=settings, folder=output, as_json=as_json)
        )
    except HeatlensError as error:
        raise _bad_parameter(error) from None
    if explained and not as_json:
        Console(soft_wrap=True).print(predictions_list(explained))
        typer.echo(f"written to {output}")
    if failed:
        Console(stderr=True, soft_wrap=True).print(failures_list(failed), end="")
        raise typer.Exit(EXIT_SOME_FAILED)


async def _explain(
    files: Sequence[ImageFile],
    *,
    options: Mapping[str, Any],
    settings: Settings,
    folder: Path,
    as_json: bool,
) -> tuple[list[Explained], list[Failed]]:
    """Explain under a progress bar; returns successes and failures, each in the order of files."""
    from service.cli.explain import Explained, Failed, explain_files

    reports: dict[str, Explained | Failed] = {}
    with _progress() as progress:
        task = progress.add_task("loading the model", total=len(files))
        async for report in explain_files(files, options=options, settings=settings, folder=folder):
            reports[report.image.name] = report
            progress.update(task, advance=1, description="explaining")
            if as_json and isinstance(report, Explained):
                typer.echo(json.dumps(report.summary(), ensure_ascii=False))
    ordered = [reports[file.name] for file in files]
    return (
        [report for report in ordered if isinstance(report, Explained)],
        [report for report in ordered if isinstance(report, Failed)],
    )


@app.command()
def models(*, config: Config = None, as_json: AsJson = False) -> None:
    """Load and check the configured models and list their properties.

    The exit code is 1 if a model is unavailable; the list gives the reason.

    For example:

    - `heatlens models`
    - `heatlens models --config heatlens.toml`
    """
    settings = _settings(config)
    from service.cli.explain import load_models

    with Console(stderr=True).status("loading the models"):
        cards = [model.card for model in asyncio.run(load_models(settings))]
    if as_json:
        for card in cards:
            typer.echo(json.dumps(msgspec.to_builtins(card), ensure_ascii=False))
    else:
        Console().print(models_list(cards, default=settings.default_model))
    if not all(card.ready for card in cards):
        raise typer.Exit(EXIT_SOME_FAILED)


def _given(**values: object) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def _settings(config: Path | None) -> Settings:
    try:
        return load_settings(config)
    except ConfigurationError as error:
        raise _wrong_configuration(error) from None


def _wrong_configuration(error: ConfigurationError) -> typer.BadParameter:
    return typer.BadParameter(str(error), param_hint="configuration")


def _bad_parameter(error: HeatlensError) -> typer.BadParameter:
    """Turn an error of the API into one about the flag that sets its field."""
    if error.field is None:
        return typer.BadParameter(error.message)
    option = error.field.split(".")[0]
    return typer.BadParameter(error.message, param_hint=FLAG_BY_OPTION.get(option, f"--{option}"))


def _progress() -> Progress:
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
