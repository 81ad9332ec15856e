"""`heatlens compare`: one image explained by many methods, as one sheet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from models.methods import METHODS
from service.cli.common import (
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

TILE = 224
_TITLE = 36
_GAP = 8
_COLUMNS = 6


class Tile(NamedTuple):
    """A titled picture of the sheet; without a picture the second line says why.

    Attributes:
        facts: the same for a program.
    """

    title: str
    subtitle: str
    picture: Image.Image | None
    facts: dict[str, Any]


def compare(
    image: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, metavar="IMAGE", help="An image file.")
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", dir_okay=False, help="[default: IMAGE.compare.png]"),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="NAME",
            autocompletion=complete_method,
            help="May be repeated. [default: all that apply]",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Class index, label, or top1 to top10.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", "-l", metavar="NAME", help="A layer by its name.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples of the stochastic methods; fewer is quicker.")
    ] = None,
    model: Model = None,
    config: Config = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Explain one image by every method, and draw the overlays side by side.

    Methods that change the image many times take their time; `--samples` bounds it.

    For example:

    - `heatlens compare cat.jpg`
    - `heatlens compare cat.jpg -m gradcam -m layercam -m rise --samples 500 -o cat.png`
    """
    options = given(
        targets=None if target is None else [target],
        layers=None if layer is None else [layer],
        samples=samples,
        model=model,
    )

    async def run() -> list[Tile]:
        async with open_client(server, config=config, model=model) as client:
            methods = method or await _applicable(client, model)
            tiles = [await _original(client, image, options)]
            with progress_bar() as progress:
                task = progress.add_task("explaining", total=len(methods))
                for number, name in enumerate(methods):
                    progress.update(task, description=name)

                    def show(share: float, number: int = number) -> None:
                        progress.update(task, completed=number + share)

                    tiles.append(await _explained(client, image, name, options, show))
                    show(1.0)
        return tiles

    with reported_errors():
        tiles = asyncio.run(run())
    written = output or image.with_suffix(".compare.png")
    draw_sheet(tiles).save(written)
    if as_json:
        original, *explained = (tile.facts for tile in tiles)
        print_json({**original, "sheet": str(written), "methods": explained})
    else:
        Console(soft_wrap=True).print(f"written to {written}")


def draw_sheet(tiles: Sequence[Tile]) -> Image.Image:
    """Lay titled pictures out in rows, on white."""
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    width, height = TILE + _GAP, TILE + _TITLE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(14), ImageFont.load_default(11)
    for index, tile in enumerate(tiles):
        x, y = _GAP + index % columns * width, _GAP + index // columns * height
        draw.text((x, y), tile.title, "black", large)
        draw.text((x, y + 18), tile.subtitle, "#555555", small)
        if tile.picture is not None:
            fitted = tile.picture.convert("RGB")
            fitted.thumbnail((TILE, TILE))
            sheet.paste(fitted, (x, y + _TITLE))
        else:
            draw.rectangle((x, y + _TITLE, x + TILE, y + _TITLE + TILE), "#eeeeee")
    return sheet


async def _applicable(client: AsyncClient, model: str | None) -> list[str]:
    """The methods that can explain a model, as the table of methods orders them."""
    card = await card_of(client, model)
    able = {support.name for support in card.methods if support.applicable}
    return [name for name in METHODS if name in able]


async def _original(client: AsyncClient, image: Path, options: dict[str, object]) -> Tile:
    """The model's crop without a map, and its best class."""
    response = await client.explain(image, **{**options, "alpha": 0.0})  # type: ignore[arg-type]
    best = response.explanation.target
    facts = {"image": str(image), "label": best.label, "probability": best.probability}
    return Tile(best.label, f"{best.probability:.1%}", response.explanation.overlay, facts)


async def _explained(
    client: AsyncClient,
    image: Path,
    method: str,
    options: dict[str, object],
    on_share: Callable[[float], None],
) -> Tile:
    import heatlens

    try:
        response = await client.explain(
            image,
            methods=[method],
            overlay_format="png",
            on_progress=lambda news: on_share(news.share),
            **options,  # type: ignore[arg-type]
        )
    except heatlens.APIError as error:
        if error.field is None or not error.field.startswith("methods"):
            raise
        why = {"method": method, "code": error.code, "error": error.message}
        return Tile(method, error.message[:44], None, why)
    shown, took_ms = response.explanation, response.timings_ms["total"]
    note = "shows nothing" if shown.degenerate else f"{took_ms:,.0f} ms"
    facts: dict[str, Any] = {
        "method": method,
        "layer": shown.layer,
        "label": shown.target.label,
        "degenerate": shown.degenerate,
        "total_ms": took_ms,
    }
    return Tile(method, f"{shown.layer}, {note}", shown.overlay, facts)
