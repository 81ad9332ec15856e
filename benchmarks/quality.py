"""How good each method's maps are on the real default model: pointing, faithfulness, time.

    python -m benchmarks.quality --pictures FOLDER --write docs/methods.md

FOLDER holds photographs and a `labels.csv` with the columns `file` and `class_id`. Two things are
measured.

Grid pointing game: mosaics of 2 x 2 photographs of four different classes, each classified
correctly alone. Each of the four classes is explained in turn; the score is the share of the map,
as it is drawn, that lies in the right cell. A map that knows nothing scores 25 %.

Faithfulness on single photographs: deletion (less is better), insertion (more is better) and
average drop (less is better), each minus the same measure of a random map, so that 0 is what chance
reaches.

Every mean has its standard error beside it. Time is processor time, which other work on the machine
does not change much.

To take minutes, RISE is made from 1,000 masks, Score-CAM from its 256 strongest channels, SS-CAM
and IS-CAM from 2 samples a channel.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from msgspec import structs
from rich.console import Console
from rich.progress import Progress

from benchmarks.photographs import Photograph, answer, job_for, photographs
from benchmarks.timing import machine_line
from models.catalog import PreprocessSpec, default_spec
from models.engine import Engine
from models.imaging.render import normalise, upsample
from models.methods import METHODS
from models.registry import ModelRegistry
from models.types import ClassRef, JobOptions, Target
from models.warm_model import WarmModel

SIDE = 224
SAMPLES = {"rise": 1000, "scorecam": 256, "ss_cam": 2, "is_cam": 2}
MEASURES = ("deletion", "insertion", "average_drop")
START, END = "<!-- quality: begin -->", "<!-- quality: end -->"


@dataclass(frozen=True)
class Row:
    """What was measured of a method.

    Attributes:
        pointing: of each map, its share in the right cell.
        faithful: by measure, of each photograph, what it differs by from a random map's.
        seconds: processor time of one map.
    """

    method: str
    pointing: list[float]
    faithful: dict[str, list[float]]
    seconds: float


def main(  # noqa: PLR0917  (typer reads its options off the signature)
    pictures: Annotated[Path, typer.Option(help="Folder with photographs and labels.csv.")],
    mosaics: Annotated[int, typer.Option(help="Mosaics for each method.")] = 12,
    singles: Annotated[int, typer.Option(help="Photographs for faithfulness.")] = 12,
    slow: Annotated[int, typer.Option(help="Of both, for methods of many passes.")] = 4,
    methods: Annotated[str, typer.Option(help="Comma-separated; all applicable by default.")] = "",
    write: Annotated[Path | None, typer.Option(help="Document to put the table into.")] = None,
) -> None:
    """Measure every applicable method and print one table."""
    console = Console()
    registry = ModelRegistry("cpu", Path())
    single = _load(registry, "single", SIDE, 256)
    mosaic = _load(registry, "mosaic", 2 * SIDE, 2 * SIDE)
    engine = Engine(registry)
    known = _correct(engine, single, pictures)
    console.print(f"{len(known)} photographs are classified correctly; {machine_line()}")
    wanted = [name for name in methods.split(",") if name] or [
        row.name for row in single.info.card.methods if row.applicable
    ]
    scenes = _mosaics(known, mosaics)
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("methods", total=len(wanted))
        for name in wanted:
            progress.update(task, description=name)
            many = METHODS[name].cost == "many"
            chosen, alone = scenes[: slow if many else None], known[: slow if many else singles]
            pointing = _pointing(engine, mosaic, name, chosen)
            faithful = _faithfulness(engine, single, name, alone)
            seconds = _seconds(engine, single, name, alone[0])
            rows.append(Row(name, pointing, faithful, seconds))
            progress.console.print(_table(rows[-1:]).splitlines()[-1], markup=False)
            progress.advance(task)
    table = _table(rows)
    console.print(table, markup=False)
    if write is not None:
        text = write.read_text()
        block = f"{START}\n{table}\n{END}"
        write.write_text(re.sub(f"{START}.*{END}", lambda _: block, text, flags=re.DOTALL))


def _load(registry: ModelRegistry, name: str, side: int, resize: int) -> WarmModel:
    spec = default_spec().model_copy(
        update={"name": name, "preprocess": PreprocessSpec(crop=side, resize=resize)}
    )
    registry.load(spec)
    return registry.get(name, spec.version)


def _correct(engine: Engine, warm: WarmModel, folder: Path) -> list[Photograph]:
    """The photographs that the model gets right."""
    found = []
    for photograph in photographs(folder, warm):
        job = job_for(warm, photograph.pixels, JobOptions(top_k=1), operation="predict")
        if answer(engine, job).predictions[0].class_id == photograph.class_id:
            found.append(photograph)
    return found


def _mosaics(known: Sequence[Photograph], count: int) -> list[tuple[np.ndarray, list[int]]]:
    order = np.random.default_rng(0)
    scenes = []
    for _ in range(count):
        chosen = [known[i] for i in order.choice(len(known), 4, replace=False)]
        a, b, c, d = (photograph.pixels for photograph in chosen)
        classes = [photograph.class_id for photograph in chosen]
        scenes.append((np.vstack([np.hstack([a, b]), np.hstack([c, d])]), classes))
    return scenes


def _pointing(
    engine: Engine,
    warm: WarmModel,
    name: str,
    scenes: Sequence[tuple[np.ndarray, list[int]]],
) -> list[float]:
    """For each map, the share of it as it is drawn that lies in the cell of the explained class."""
    shares = []
    for pixels, classes in scenes:
        outcome = answer(engine, job_for(warm, pixels, _options(warm, name, classes)))
        for cell, explanation in enumerate(outcome.explanations):
            large = upsample(explanation.map, height=2 * SIDE, width=2 * SIDE)
            unit = normalise(large, signed=explanation.signed)
            if unit is None:
                shares.append(0.25)
                continue
            positive = np.maximum(unit - 0.5, 0) if explanation.signed else unit
            y, x = divmod(cell, 2)
            inside = positive[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE].sum()
            shares.append(float(inside / positive.sum()) if positive.any() else 0.25)
    return shares


def _faithfulness(
    engine: Engine, warm: WarmModel, name: str, known: Sequence[Photograph]
) -> dict[str, list[float]]:
    """Each measure, less that of a random map, of every photograph."""
    found: dict[str, list[float]] = defaultdict(list)
    for photograph in known:
        options = _options(warm, name, [photograph.class_id])
        options = structs.replace(options, faithfulness=MEASURES)
        outcome = answer(engine, job_for(warm, photograph.pixels, options))
        for measure, pair in outcome.explanations[0].faithfulness.items():
            found[measure].append(pair.value - pair.random)
    return found


def _seconds(engine: Engine, warm: WarmModel, name: str, photograph: Photograph) -> float:
    """Processor seconds of one map."""
    options = _options(warm, name, [photograph.class_id])
    started = time.process_time()
    answer(engine, job_for(warm, photograph.pixels, options))
    return time.process_time() - started


def _options(warm: WarmModel, name: str, classes: Sequence[int]) -> JobOptions:
    assert warm.target_layer is not None
    return JobOptions(
        methods=(name,),
        layers=(warm.target_layer,),
        targets=tuple(Target(cls=ClassRef(kind="index", value=c)) for c in classes),
        samples=SAMPLES.get(name),
    )


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| method | pointing, % in the cell | maps | deletion | insertion | average drop | "
        "photographs | s a map |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -np.mean(row.pointing)):
        measures = " | ".join(_mean(row.faithful[m], "+.3f") for m in MEASURES)
        pointing = _mean([100 * share for share in row.pointing], ".1f")
        alone = len(row.faithful[MEASURES[0]])
        lines.append(
            f"| `{row.method}` | {pointing} | {len(row.pointing)} | {measures} | {alone} | "
            f"{row.seconds:.3f} |"
        )
    return "\n".join(lines)


def _mean(values: Sequence[float], digits: str) -> str:
    """The mean and its standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):{digits}} ± {error:{digits.removeprefix('+')}}"


if __name__ == "__main__":
    typer.run(main)
