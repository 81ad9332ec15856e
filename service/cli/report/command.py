"""`heatlens report`: the audit of a classifier on labelled images."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console

from service.cli.common import (
    EXIT_SOME_FAILED,
    AsJson,
    Config,
    Model,
    Server,
    card_of,
    complete_method,
    given,
    open_client,
    print_json,
    progress_bar,
    reported_errors,
)

if TYPE_CHECKING:
    from heatlens import AsyncClient
    from service.cli.report.clusters import Cluster
    from service.cli.report.page import Report
    from service.cli.report.records import Record


def report(
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, metavar="DIR", help="Folder of images.")
    ],
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", dir_okay=False, help="The page; its JSON is written next to it."
        ),
    ] = Path("heatlens-report.html"),
    labels: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="CSV with the columns file and label (or class_id), and x, y, width, height of a "
            "box if known. [default: DIR/labels.csv, or a folder for each class]",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            metavar="NAME",
            autocompletion=complete_method,
            help="Method of the maps.",
        ),
    ] = "gradcam",
    layer: Annotated[
        str | None, typer.Option("--layer", "-l", metavar="NAME", help="[default: the model's own]")
    ] = None,
    faithfulness: Annotated[
        int, typer.Option(min=0, help="Number of images whose maps are tested; 0 for none.")
    ] = 20,
    model: Model = None,
    config: Config = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Audit a classifier on labelled images, and write one page that opens anywhere.

    Accuracy, calibration and confusions; the most confident errors and why; how much of the
    attribution lies on the border or on the object; and groups of images that the model looks at
    alike, where shortcuts show. The same command again takes up where it was interrupted.

    For example:

    - `heatlens report photos/` with `photos/cat/1.jpg`, `photos/dog/2.jpg`, …
    - `heatlens report photos/ --labels labels.csv -o audit.html --server http://127.0.0.1:8000`
    """
    _need_extra()
    options = given(model=model, methods=[method], layers=None if layer is None else [layer])

    async def run() -> tuple[Report, str]:
        async with open_client(server, config=config, model=model) as client:
            return await _audit(
                client,
                folder=folder,
                table=labels,
                options=options,
                measured=faithfulness,
                output=output,
            )

    with reported_errors():
        found, page = asyncio.run(run())
    output.write_text(page, encoding="utf-8")
    numbers = msgspec.json.format(msgspec.json.encode(found), indent=2)
    output.with_suffix(".json").write_bytes(numbers)
    _summarise(found, output, as_json=as_json)
    if found.failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _need_extra() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise typer.BadParameter(
            "Clustering needs scikit-learn: pip install 'heatlens[report]'"
        ) from None


async def _audit(
    client: AsyncClient,
    *,
    folder: Path,
    table: Path | None,
    options: dict[str, Any],
    measured: int,
    output: Path,
) -> tuple[Report, str]:
    """Explain, cluster and draw; returns the numbers and the page."""
    from service.cli.report.clusters import find_clusters, spread
    from service.cli.report.dataset import DatasetError, read_dataset
    from service.cli.report.page import render_page
    from service.cli.report.pictures import cluster_pictures, error_pictures
    from service.cli.report.records import RecordFile, collect

    found_card = await card_of(client, options.get("model"))
    # With its version, so that records of another one are not taken for its own.
    card = f"{found_card.name}@{found_card.version}"
    names = await client.labels(card)
    try:
        images = read_dataset(folder, table, names)
    except DatasetError as error:
        raise typer.BadParameter(str(error), param_hint="DIR") from None
    setting = {"model": card, "measured": measured, **options}
    file = RecordFile(output.with_suffix(".records.jsonl"), setting)
    with progress_bar() as progress:
        done = sum(str(image.path.relative_to(folder)) in file.records for image in images)
        task = progress.add_task("explaining", total=len(images), completed=done)
        work = collect(client, images, file, folder=folder, options=options, measured=measured)
        async with aclosing(work):
            async for _ in work:
                progress.advance(task)
        records = [file.records[str(image.path.relative_to(folder))] for image in images]
        good = [record for record in records if record.error is None]
        if not good:
            raise typer.BadParameter(f"No image could be explained: {records[0].error}")
        compared = spread(good)
        clusters = find_clusters(compared, names)
        task = progress.add_task("drawing", total=1 + len(clusters))
        errors = await error_pictures(
            client, [r for r in good if not r.correct], folder=folder, options=options
        )
        progress.advance(task)
        shown = []
        for cluster in clusters:
            shown.append(
                await cluster_pictures(client, cluster, compared, folder=folder, options=options)
            )
            progress.advance(task)
    found = _numbers(
        records,
        title=f"Report on {folder.name or folder}, {time.strftime('%Y-%m-%d')}",
        model=card,
        method=options["methods"][0],
        labels=names,
        clusters=clusters,
        compared=len(compared),
    )
    return found, render_page(found, labels=names, errors=errors, clusters=shown)


def _numbers(
    records: Sequence[Record],
    *,
    title: str,
    model: str,
    method: str,
    labels: Sequence[str],
    clusters: Sequence[Cluster],
    compared: int,
) -> Report:
    from service.cli.report import analysis
    from service.cli.report.page import Report

    good = [record for record in records if record.error is None]
    measures: dict[str, list[tuple[float, float]]] = {}
    for record in good:
        for name, pair in record.faithfulness.items():
            measures.setdefault(name, []).append(pair)
    return Report(
        title=title,
        model=model,
        method=method,
        images=len(records),
        failed={record.path: record.error for record in records if record.error is not None},
        accuracy=analysis.proportion(sum(record.correct for record in good), len(good)),
        calibration=analysis.calibration(good),
        attribution=analysis.attribution(good),
        faithfulness={
            name: (
                sum(value for value, _ in pairs) / len(pairs),
                sum(random for _, random in pairs) / len(pairs),
                len(pairs),
            )
            for name, pairs in measures.items()
        },
        classes=tuple(analysis.class_rows(good, labels)),
        confusions=tuple(analysis.confusions(good, labels)),
        clusters=tuple(clusters),
        compared=compared,
    )


def _summarise(found: Report, output: Path, *, as_json: bool) -> None:
    from service.cli.report.page import sentence

    accuracy = found.accuracy
    findings = [sentence(cluster) for cluster in found.clusters if cluster.suspicious]
    if as_json:
        numbers = {"accuracy": accuracy.value, "calibration_error": found.calibration.ece}
        print_json({"page": str(output), "images": found.images, **numbers, "findings": findings})
        return
    console = Console(soft_wrap=True)
    console.print(
        f"accuracy {accuracy.value:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}), "
        f"{accuracy.total} images, calibration error {found.calibration.ece:.1%}"
    )
    for finding in findings:
        console.print(f"[bold]look closer:[/] {finding}")
    console.print(f"written to {output}")
