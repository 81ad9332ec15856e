"""The command line, `heatlens`.

Each command imports what it needs when it runs, so that `heatlens --help` is fast.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from service.cli.bench.command import bench
from service.cli.common import EXIT_INTERRUPTED, Config, given, wrong_configuration
from service.cli.compare import compare
from service.cli.explain import explain
from service.cli.init import init
from service.cli.inspect import check, layers, models
from service.cli.report.command import report
from service.configuration import ConfigurationError


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
for command in (bench, check, compare, explain, init, layers, models, report):
    app.command()(command)


def main() -> None:
    """Run the command line and exit."""
    try:
        app(prog_name="heatlens")
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            # A model may still be loading in a thread, and torch aborts when the interpreter ends
            # under it.
            sys.stdout.flush()
            os._exit(EXIT_INTERRUPTED)
        raise


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
    server = given(
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
        raise wrong_configuration(error) from None
    configure_logging(settings.server.log_level)
    raise typer.Exit(Supervisor(settings, source=source).run())
