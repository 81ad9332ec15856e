"""Eight methods on one photograph, explained by the embedded default model, as one picture for the documentation.

    python -m benchmarks.contact_sheet docs/images

Photographs are scikit-image's own. To take seconds, RISE is made from 500 masks instead of its
default, Score-CAM from the 64 strongest channels.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from benchmarks.photographs import answer, job_for, model_input
from models.catalog import default_spec
from models.engine import Engine
from models.imaging.render import input_canvas, overlay, quantise, shade
from models.imaging.style import style_of
from models.methods import METHODS
from models.registry import ModelRegistry
from models.types import Explanation, JobOptions, Outcome
from models.warm_model import WarmModel

PHOTOGRAPHS = ("chelsea", "coffee")
METHODS_SHOWN = (
    "gradcam", "layercam", "eigencam", "fullgrad", "lrp", "integrated_gradients", "scorecam", "rise",
)  # fmt: skip
SAMPLES = {"rise": 500, "scorecam": 64}
COLUMNS = 3
TILE, TITLE = 224, 18


def main(
    folder: Annotated[Path, typer.Argument(help="Where NAME-methods.jpg are written.")],
    photographs: Annotated[str, typer.Option(help="Of skimage.data.")] = ",".join(PHOTOGRAPHS),
) -> None:
    """Explain each photograph and write its sheet."""
    registry, spec = ModelRegistry("cpu", Path()), default_spec()
    registry.load(spec)
    warm = registry.get(spec.name, spec.version)
    for name in photographs.split(","):
        file = io.BytesIO()
        Image.fromarray(getattr(data, name)()).save(file, "PNG")
        pixels = model_input(file.getvalue(), warm)
        outcome = explain(Engine(registry), warm, pixels)
        best = outcome.predictions[0]
        title = f"{warm.info.labels[best.class_id]}, {best.probability:.0%}"
        path = folder / f"{name}-methods.jpg"
        sheet(pixels, outcome.explanations, title=title).save(path, "JPEG", quality=80)
        typer.echo(f"{path}: {title}, {path.stat().st_size // 1000} kB")


def explain(engine: Engine, warm: WarmModel, pixels: np.ndarray) -> Outcome:
    """Maps of every shown method for the best class."""
    maps: list[Explanation] = []
    for method in METHODS_SHOWN:
        options = JobOptions(
            methods=(method,),
            layers=(warm.target_layer or "",),
            samples=SAMPLES.get(method),
        )
        found = answer(engine, job_for(warm, pixels, options))
        maps += found.explanations
    return Outcome(id="", predictions=found.predictions, explanations=tuple(maps))


def sheet(pixels: np.ndarray, explanations: tuple[Explanation, ...], *, title: str) -> Image.Image:
    """The photograph, then its overlays, titled, three in a row."""
    tiles = [(title, Image.fromarray(pixels))]
    canvas = input_canvas(pixels)
    for explanation in explanations:
        style = style_of(
            signed=explanation.signed,
            of_pixels=METHODS[explanation.method].family == "pixels",
        )
        levels = quantise(shade(explanation.map, canvas, style))
        drawn = overlay(levels, canvas, style, alpha=0.5, image_format="png")
        tiles.append((explanation.method, Image.open(io.BytesIO(drawn))))
    rows = -(-len(tiles) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + TITLE)), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(13)
    for i, (name, tile) in enumerate(tiles):
        x, y = i % COLUMNS * TILE, i // COLUMNS * (TILE + TITLE)
        draw.text((x + 4, y + 1), name, "black", font)
        whole.paste(tile.resize((TILE, TILE)), (x, y + TITLE))
    return whole


if __name__ == "__main__":
    typer.run(main)
