"""The proof, made when a network is loaded, that its answers are one row of scores per image."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelLoadFailed
from models.first_run import run_once
from models.hooks import HookStack
from models.outputs import Reading, adapt, describe, find_scores, run_straight
from models.probabilities import undo_probabilities
from models.probe import probe_batch
from models.types import Preprocess, Task

PROVED_IMAGES = 3
ABSOLUTE = 1e-5
RELATIVE = 1e-3

_ONE_SCORE = (
    "The model gives one score per image, which a softmax makes 1 for every image. "
    'For a network with a single logit set task = "binary" (two labels, or none); '
    'for a single class that may be absent set task = "multi_label".'
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Proved:
    """A network that may answer.

    Attributes:
        module: (N, C, H, W) → (N, outputs) scores; it leaves its input as it is.
        outputs: scores per image.
        notes: what was done to the network or its answers, as sentences for the model card.
    """

    module: nn.Module
    outputs: int
    notes: tuple[str, ...]


def prove_network(
    module: nn.Module, preprocess: Preprocess, task: Task, *, output: int | str | None = None
) -> Proved:
    """Prove that a network on the CPU can be served, and adapt it where its answers need that.

    The same image must get the same scores alone, in other company and at another place of the
    batch. Single tensors within a tuple, dictionary or object are taken out, work on the input in
    place happens on a copy, and probabilities become scores again. Of several tensors `output` says
    which are the scores.

    Raises:
        ModelLoadFailed: the network cannot be served; the text says why.
    """
    images = probe_batch(preprocess, images=PROVED_IMAGES)
    try:
        reading, scores = _read(module, images, task, output)
        module = adapt(module, reading)
    except ModelLoadFailed:
        alone = _read_alone(module, images, task, output)
        if alone is None:
            raise
        module, reading, scores = alone
    _check_finite(scores)
    if scores.shape[1] == 1 and task == "single_label":
        raise ModelLoadFailed(_ONE_SCORE)
    if scores.shape[1] > 2 and task == "binary":
        raise ModelLoadFailed(
            f'The model has {scores.shape[1]} scores per image, but task = "binary" is for one '
            'score, or two. Use "single_label" or "multi_label".'
        )
    module, laid_out = _independent(module, images, scores)
    undone: list[str] = []
    if task != "embedding":
        module, undone = undo_probabilities(module, images, scores, task=task)
    notes = (*reading.notes(), *laid_out.notes(), *undone)
    return Proved(module=module, outputs=scores.shape[1], notes=notes)


def _read(
    module: nn.Module, images: Tensor, task: Task, output: int | str | None
) -> tuple[Reading, Tensor]:
    """How a network's answer is read, and the scores in it."""
    given = images.clone()
    with run_straight() as checkpointed:
        answer = run_once(module, given)
    key, scores = find_scores(answer, output)
    reading = _reading(key, scores, task, images=len(images))
    in_place = int(given._version) > 0  # noqa: SLF001
    reading = replace(reading, in_place=in_place, straight=bool(checkpointed))
    return reading, reading.scores(answer)


@torch.no_grad()
def _read_alone(
    module: nn.Module, images: Tensor, task: Task, output: int | str | None
) -> tuple[nn.Module, Reading, Tensor] | None:
    """The same of a network that takes one image at a time, adapted to batches; None if it does not."""
    try:
        reading, _ = _read(module, images[:1], task, output)
        reading = replace(reading, single=True)
        module = adapt(module, reading)
        return module, reading, module(images)
    # It fails on one image, too, or on another.
    except Exception:  # noqa: BLE001
        return None


def _reading(key: int | str | None, scores: Tensor, task: Task, *, images: int) -> Reading:
    """How the scores of some images lie in the answer."""
    if not scores.is_floating_point():
        raise ModelLoadFailed(
            f"The model returns whole numbers ({describe(scores)}), as argmax gives them: let its "
            "forward return the scores that they are made of."
        )
    if task == "segmentation":
        if scores.ndim != 4 or scores.shape[0] != images or scores.shape[2:] == (1, 1):
            raise ModelLoadFailed(
                f"The model answers {images} images with {describe(scores)}, not with a map "
                "of scores for each class."
            )
        return Reading(key=key)
    flat = task == "binary" and scores.shape == (images,)
    pooled = scores.ndim == 4 and scores.shape[0] == images and scores.shape[2:] == (1, 1)
    lone = images == 1 and scores.ndim == 1 and len(scores) > 1
    if not (flat or pooled or lone) and (scores.ndim != 2 or scores.shape[0] != images):
        hint = ""
        if scores.shape == (images,):
            hint = ' For a network with a single logit set task = "binary".'
        if scores.ndim == 4 and scores.shape[0] == images:
            hint = ' For a network that scores every pixel set task = "segmentation".'
        raise ModelLoadFailed(
            f"The model answers {images} images with {describe(scores)}, "
            f"not with one row of scores per image.{hint}"
        )
    return Reading(key=key, flat=flat, pooled=pooled, lone=lone)


def _check_finite(scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise ModelLoadFailed("The model's scores are not finite; its weights may be damaged.")


@torch.no_grad()
def _independent(module: nn.Module, images: Tensor, scores: Tensor) -> tuple[nn.Module, Reading]:
    """Refuse networks whose scores depend on chance, or on what else is in the batch.

    The images come as they are served, channels_last; returns the network adapted to that.
    """
    order, reading = [2, 0, 1], Reading()
    permuted = images[order].contiguous(memory_format=torch.channels_last)
    if not _gives(module, permuted, scores[order]):
        reading = Reading(contiguous=True)
        if not _gives(module, images[order], scores[order]):
            raise ModelLoadFailed(_dependence(module, images, scores))
        module = adapt(module, reading)
    if _loses_the_batch_at_last(module, images[:1], outputs=scores.shape[1]):
        module = adapt(module, Reading(lone=True))
    try:
        alone = _alone(module, images[:1], like=scores)
    except ModelLoadFailed:
        with suppress(ModelLoadFailed):
            module = adapt(module, Reading(twice=True))
        if not _gives(module, images[:1], scores):
            raise
        reading = replace(reading, twice=True)
        return module, reading
    if not _same(alone, scores[:1], scores):
        raise ModelLoadFailed(_dependence(module, images, scores))
    return module, reading


def _gives(module: nn.Module, images: Tensor, scores: Tensor) -> bool:
    """Whether a network gives the first images of a batch the scores that they have in it.

    One that does not take some layout of memory or size of batch says so in many ways.
    """
    with suppress(Exception):
        return _same(module(images), scores[: len(images)], scores)
    return False


def _loses_the_batch_at_last(module: nn.Module, image: Tensor, *, outputs: int) -> bool:
    """Whether an image alone has its scores squeezed, after layers that all keep the batch."""
    lost: list[bool] = []

    def note(_child: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        lost.append(isinstance(output, Tensor) and output.shape[:1] != (1,))

    with HookStack() as hooks:
        for name, child in module.named_modules():
            if name:
                hooks.forward(child, note)
        with suppress(Exception):
            return bool(module(image).shape == (outputs,)) and not any(lost)
    return False


def _dependence(module: nn.Module, images: Tensor, scores: Tensor) -> str:
    """What the scores of an image depend on besides it, as a sentence."""
    if not _gives(module, images, scores):
        return (
            "The model's scores change from pass to pass for the same image: something in it is "
            "random or remembers earlier images. Functional dropout needs training=self.training."
        )
    return (
        "The model's scores depend on the other images of a batch. Causes are batch normalisation "
        "by the batch's own statistics (track_running_stats=False, or train() in forward), and "
        "means or softmaxes over dimension 0."
    )


def _alone(module: nn.Module, image: Tensor, *, like: Tensor) -> Tensor:
    try:
        scores: Tensor = module(image)
    except Exception as error:
        raise ModelLoadFailed(
            "The model answers several images, but fails on one alone. Often x.squeeze() also "
            "drops the dimension of the batch: use x.flatten(1)."
        ) from error
    if scores.ndim != like.ndim or len(scores) != 1:
        raise ModelLoadFailed(
            f"The model answers one image alone with {describe(scores)}, not with one row of "
            "scores. Often x.squeeze() also drops the dimension of the batch: use x.flatten(1)."
        )
    return scores


def _same(found: Tensor, expected: Tensor, scores: Tensor) -> bool:
    """Whether scores are equal but for rounding.

    Rounding is judged by the size of all scores, and by how much they differ between images: a
    network that hardly tells the images apart must not pass for that.
    """
    spread = (scores - scores.mean(0)).abs().max()
    tolerance = ABSOLUTE * scores.abs().max() + RELATIVE * spread
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance)
