"""The proof, made when a network is loaded, that its answers are one row of scores per image."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelLoadFailed
from models.hooks import HookStack
from models.outputs import Reading, adapt, describe, find_scores, undo_probabilities
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


def prove_network(module: nn.Module, preprocess: Preprocess, task: Task) -> Proved:
    """Prove that a network on the CPU can be served, and adapt it where its answers need that.

    The same image must get the same scores alone, in other company and at another place of the
    batch. Single tensors within a tuple, dictionary or object are taken out, work on the input in
    place happens on a copy, and probabilities become scores again.

    Raises:
        ModelLoadFailed: the network cannot be served; the text says why.
    """
    images = probe_batch(preprocess, images=PROVED_IMAGES)
    given = images.clone()
    answer = _run(module, given)
    reading = _reading(answer, task, in_place=int(given._version) > 0)  # noqa: SLF001
    module = adapt(module, reading)
    scores = reading.scores(answer)
    _check_finite(scores)
    if scores.shape[1] == 1 and task == "single_label":
        raise ModelLoadFailed(_ONE_SCORE)
    if scores.shape[1] > 2 and task == "binary":
        raise ModelLoadFailed(
            f'The model has {scores.shape[1]} scores per image, but task = "binary" is for one '
            'score, or two. Use "single_label" or "multi_label".'
        )
    module, laid_out = _independent(module, images, scores)
    module, undone = undo_probabilities(module, images, scores, task=task)
    notes = (*reading.notes(), *laid_out.notes(), *undone)
    return Proved(module=module, outputs=scores.shape[1], notes=notes)


@torch.no_grad()
def _run(module: nn.Module, images: Tensor) -> Any:
    """What the network returns.

    Raises:
        ModelLoadFailed: it raised; the text says what it takes instead, if that can be told.
    """
    _check_arguments(module)
    entered: list[nn.Module] = []
    try:
        with _watching(module, entered):
            return module(images)
    except Exception as error:
        where = entered[-1] if entered else module
        raise ModelLoadFailed(_why_it_raised(module, where, images)) from error


def _why_it_raised(module: nn.Module, where: nn.Module, images: Tensor) -> str:
    """What to change where a network raised within a layer, as sentences."""
    channels, height, width = images.shape[1:]
    name = next((n for n, child in module.named_modules() if child is where and n), "")
    place = f"its layer {name} ({type(where).__name__})" if name else "its forward"
    if isinstance(where, nn.Conv2d) and where.in_channels != channels:
        wanted = where.in_channels
        values = f"one value{' each' if wanted > 1 else ''}"
        return (
            f"The network takes images of {wanted} channel{'s' if wanted > 1 else ''}, but is "
            f"given {channels}. Under [models.preprocess] set channels = {wanted}, and mean and std "
            f"to {values}."
        )
    text = (
        f"The network raises an error in {place} for images of {width} x {height} pixels with "
        f"{channels} channel{'s' if channels > 1 else ''}. "
    )
    if isinstance(where, nn.Linear):
        return text + _other_size(where.in_features, channels)
    return text + (
        "Under [models.preprocess], crop is the size of its input, and channels are 1 for grey."
    )


def _other_size(features: int, channels: int) -> str:
    """Which images would fill a linear layer, if they are flattened for it."""
    for wanted in dict.fromkeys((channels, 1, 3)):
        side = math.isqrt(features // wanted)
        if side >= 8 and wanted * side * side == features:
            return (
                f"The layer takes {features} values, as flattened images of {side} x {side} with "
                f"{wanted} channel{'s' if wanted > 1 else ''} have: set crop = {side} and channels "
                f"= {wanted} under [models.preprocess]."
            )
    return (
        f"The layer takes {features} values: was the network trained at another input size? Set "
        "crop under [models.preprocess]."
    )


def _check_arguments(module: nn.Module) -> None:
    """Refuse networks that want more than images."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise ModelLoadFailed(
            f"The network takes {len(needed)} inputs ({', '.join(needed)}); only images are "
            "served. Give the others a constant value each, as in "
            f"inputs = {{ {needed[1]} = [0.0] }}, or defaults in the network."
        )


@contextmanager
def _watching(module: nn.Module, entered: list[nn.Module]) -> Iterator[None]:
    """Keep the modules that were entered and not left, the innermost last."""

    def enter(child: nn.Module, _args: tuple[Any, ...]) -> None:
        entered.append(child)

    def leave(_child: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        entered.pop()

    with HookStack() as hooks:
        for child in module.modules():
            hooks.forward_pre(child, enter)
            hooks.forward(child, leave)
        yield


def _reading(answer: Any, task: Task, *, in_place: bool) -> Reading:
    """How the answer to a batch of `PROVED_IMAGES` is read."""
    key, scores = find_scores(answer)
    flat = task == "binary" and scores.shape == (PROVED_IMAGES,)
    if not flat and (scores.ndim != 2 or scores.shape[0] != PROVED_IMAGES):
        hint = ""
        if scores.shape == (PROVED_IMAGES,):
            hint = ' For a network with a single logit set task = "binary".'
        raise ModelLoadFailed(
            f"The model answers {PROVED_IMAGES} images with {describe(scores)}, "
            f"not with one row of scores per image.{hint}"
        )
    return Reading(key=key, flat=flat, in_place=in_place)


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
    if not _answers(module, permuted, scores[order]):
        reading = Reading(contiguous=True)
        if not _answers(module, images[order], scores[order]):
            raise ModelLoadFailed(_dependence(module, images, scores))
        module = adapt(module, reading)
    if not _same(_alone(module, images[:1]), scores[:1], scores):
        raise ModelLoadFailed(_dependence(module, images, scores))
    return module, reading


def _answers(module: nn.Module, images: Tensor, expected: Tensor) -> bool:
    """Whether a network gives a whole batch's scores again."""
    try:
        return _same(module(images), expected, expected)
    # A network that takes one layout of memory only says so in many ways.
    except Exception:  # noqa: BLE001
        return False


def _dependence(module: nn.Module, images: Tensor, scores: Tensor) -> str:
    """What the scores of an image depend on besides it, as a sentence."""
    if not _answers(module, images, scores):
        return (
            "The model's scores change from pass to pass for the same image: something in it is "
            "random or remembers earlier images. Functional dropout needs training=self.training."
        )
    return (
        "The model's scores depend on the other images of a batch. Causes are batch normalisation "
        "by the batch's own statistics (track_running_stats=False), and means or softmaxes over "
        "dimension 0."
    )


def _alone(module: nn.Module, image: Tensor) -> Tensor:
    try:
        scores: Tensor = module(image)
    except Exception as error:
        raise ModelLoadFailed(
            "The model answers several images, but fails on one alone. Often x.squeeze() also "
            "drops the dimension of the batch: use x.flatten(1)."
        ) from error
    if scores.ndim != 2 or len(scores) != 1:
        raise ModelLoadFailed(
            f"The model answers one image alone with {describe(scores)}, not with one row of "
            "scores. Often x.squeeze() also drops the dimension of the batch: use x.flatten(1)."
        )
    return scores


def reaches_input(scores: Tensor) -> bool:
    """Whether the recorded graph of a frozen network's scores goes back to its input."""
    nodes, seen = [scores.grad_fn], set()
    while nodes:
        node = nodes.pop()
        # Quantised operations are recorded, but not differentiated.
        if node is None or node in seen or "NotImplemented" in node.name():
            continue
        if node.name().endswith("AccumulateGrad"):
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def _same(found: Tensor, expected: Tensor, scores: Tensor) -> bool:
    """Whether scores are equal but for rounding.

    Rounding is judged by the size of all scores, and by how much they differ between images: a
    network that hardly tells the images apart must not pass for that.
    """
    spread = (scores - scores.mean(0)).abs().max()
    tolerance = ABSOLUTE * scores.abs().max() + RELATIVE * spread
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance)
