"""`heatlens explain`: overlays and numbers for files and folders."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.text import Text

from models.imaging.colormaps import Colormap
from models.methods import METHODS
from service.cli.common import (
    EXIT_SOME_FAILED,
    AsJson,
    Config,
    Model,
    Server,
    complete_method,
    given,
    open_client,
    print_json,
    progress_bar,
    reported_errors,
)
from service.cli.files import ImageFile, find_images

if TYPE_CHECKING:
    from service.cli.explaining import Explained, Failed


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
            "--method",
            "-m",
            metavar="NAME",
            autocompletion=complete_method,
            help=f"May be repeated. One of {', '.join(METHODS)}.",
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
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="TEXT",
            help="A text as a class, for a zero_shot model; repeat for each.",
        ),
    ] = None,
    model: Model = None,
    config: Config = None,
    server: Server = None,
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
    """Explain images, in this process or through a service.

    Writes an overlay `NAME.METHOD.CLASS.jpg` for each method and class, and everything else as
    `NAME.json`. An image that fails does not stop the others, but the exit code is 1. The same
    command again takes up where it was interrupted.

    For example:

    - `heatlens explain cat.jpg`
    - `heatlens explain photos/ -o out -m gradcam -m layercam -t top1 -t tabby`
    - `heatlens explain photos/ --server http://127.0.0.1:8000 --json`
    """
    options = given(
        methods=method,
        targets=target,
        layers=layer,
        labels=label,
        model=model,
        colormap=colormap,
        clip=clip,
        alpha=alpha,
        canvas=canvas,
    )
    files = find_images(images)
    if not files:
        raise typer.BadParameter("There are no images in these folders.", param_hint="IMAGE")
    output.mkdir(parents=True, exist_ok=True)

    async def run() -> tuple[list[Explained], list[Failed]]:
        with progress_bar() as progress:
            task = progress.add_task("loading the model", total=len(files))
            async with open_client(server, config=config, model=model) as client:
                from service.cli.explaining import explain_files

                reports: dict[str, Explained | Failed] = {}
                under_way: dict[str, float] = {}

                def show() -> None:
                    done = len(reports) + sum(under_way.values())
                    progress.update(task, completed=done, description="explaining")

                def note(name: str, share: float) -> None:
                    under_way[name] = share
                    show()

                work = explain_files(
                    client, files, options=options, folder=output, on_progress=note
                )
                async with aclosing(work):
                    async for report in work:
                        reports[report.image.name] = report
                        under_way.pop(report.image.name, None)
                        show()
                        if as_json:
                            print_json(report.summary())
        return _in_order(files, reports)

    with reported_errors():
        explained, failed = asyncio.run(run())
    if explained and not as_json:
        Console(soft_wrap=True).print(_predictions_list(explained))
        resumed = sum(report.resumed for report in explained)
        typer.echo(f"written to {output}" + (f", {resumed} of them before" if resumed else ""))
    if failed:
        if not as_json:
            Console(stderr=True, soft_wrap=True).print(_failures_list(failed), end="")
        raise typer.Exit(EXIT_SOME_FAILED)


def _in_order(
    files: Sequence[ImageFile], reports: Mapping[str, Any]
) -> tuple[list[Explained], list[Failed]]:
    """Successes and failures, each in the order of the files."""
    from service.cli.explaining import Explained, Failed

    ordered = [reports[file.name] for file in files]
    return (
        [report for report in ordered if isinstance(report, Explained)],
        [report for report in ordered if isinstance(report, Failed)],
    )


def _predictions_list(reports: Iterable[Explained]) -> Text:
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


def _failures_list(reports: Iterable[Failed]) -> Text:
    """Each image that could not be explained, with the reason."""
    text = Text()
    for report in reports:
        text.append(f"{report.image.path}\n", "bold red")
        text.append(f"  {report.code}: {report.message}\n")
    return text
