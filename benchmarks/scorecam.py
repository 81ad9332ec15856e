"""Score-CAM beside pytorch-grad-cam's, on ResNet-50 with random weights, one picture.

    python -m benchmarks.scorecam

Both score every channel of the last stage for the top class. `strongest 512` scores a quarter of
the channels, those of the greatest energy, as `samples=512` asks for. Rank correlations are between
low-resolution maps; with random weights the channel softmax rests on very few channels, so that
they say less than those on a trained network.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.engine import job_maker, model_spec
from benchmarks.photographs import answer, engine_of
from benchmarks.timing import machine_line
from models.imaging.render import upsample
from models.registry import ModelRegistry
from models.types import ClassRef, JobOptions, Target
from models.warm_model import WarmModel

SIDE = 224


def main(
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    model: Annotated[str, typer.Option(help="Of torchvision.")] = "resnet50",
) -> None:
    """Time each once, after a warm-up of a small pass, and print a table."""
    torch.set_num_threads(threads)
    console = Console(width=120)
    console.print(machine_line(), highlight=False)
    peer_s, peer = _peer(model)
    console.print(f"pytorch-grad-cam, fp32: {peer_s:.1f} s", highlight=False)
    for precision in ("fp32", "bf16"):
        warm = _load(model, precision)
        if warm.info.card.precision != precision:
            console.print(f"Heatlens, {precision}: not served on this device", highlight=False)
            continue
        for samples in (None, 512):
            seconds, found = _ours(warm, samples)
            name = f"Heatlens, {precision}, " + (
                "all channels" if samples is None else "strongest 512"
            )
            ratio, rho = peer_s / seconds, _rank_correlation(found, peer)
            console.print(
                f"{name}: {seconds:.1f} s, {ratio:.2f}x, rank correlation {rho:.3f}",
                highlight=False,
            )


def _load(model: str, precision: str) -> WarmModel:
    registry = ModelRegistry("cpu", Path())
    spec = model_spec(model, precision)
    registry.load(spec)
    return registry.get(spec.name, spec.version)


def _ours(warm: WarmModel, samples: int | None) -> tuple[float, np.ndarray]:
    assert warm.target_layer is not None
    options = JobOptions(
        methods=("scorecam",),
        layers=(warm.target_layer,),
        targets=(Target(cls=ClassRef(kind="rank", value=1)),),
        samples=samples,
    )
    (job,) = job_maker(warm, 1)("explain", options)
    started = time.perf_counter()
    values = answer(engine_of(warm), job).explanations[0].map
    return time.perf_counter() - started, upsample(values, height=SIDE, width=SIDE)


def _peer(model: str) -> tuple[float, np.ndarray]:
    warm = _load(
        model, "fp32"
    )  # first: it makes torchvision importable where its operators do not load
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_grad_cam import ScoreCAM
    assert warm.target_layer is not None
    inputs = warm.normalise(
        torch.from_numpy(job_maker(warm, 1)("predict", JobOptions())[0].input)[None]
    )
    # As documented: the plain module, in torch's default memory format.
    plain = warm.module.to(memory_format=torch.contiguous_format)
    layer = plain.get_submodule(warm.target_layer)
    with ScoreCAM(model=plain, target_layers=[layer]) as cam:
        started = time.perf_counter()
        found = cam(input_tensor=inputs.contiguous(), targets=None)[0]
        return time.perf_counter() - started, found


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values.ravel(), kind="stable")) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    typer.run(main)
