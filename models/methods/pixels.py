"""Methods that explain pixels of the input, by gradients or by relevance.

Each is a generator of steps that returns float32 maps (T, H, W) at the resolution of the input, not
normalised. Notation: x = the normalised input, dx y = gradient of the score at x. Maps whose sign
has a meaning are sums over the three colours; in the others a pixel has the largest value among its
colours.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.methods._guided import guided_gradients
from models.methods._lrp import Explained, relevance
from models.methods.gradient import gradcam
from models.steps import (
    Forward,
    InputGradient,
    NotedMaps,
    Step,
    Steps,
    Subject,
    run_by_targets,
    run_unbatched,
)

_NOISE = 0.15
_COLOURS = 1
# Images that LRP's rules are worth for each target.
_RULES_COST = 10


def saliency(subject: Subject) -> Steps:
    """Largest |dx y| among the colours (Simonyan et al. 2014, section 3.1)."""
    gradients = yield from _gradients(subject)
    return gradients.abs().amax(_COLOURS)


def input_x_gradient(subject: Subject) -> Steps:
    """Sum over the colours of x * dx y (Shrikumar et al. 2016), signed."""
    gradients = yield from _gradients(subject)
    return (subject.inputs.float() * gradients).sum(_COLOURS)


def guided_backprop(subject: Subject) -> Steps:
    """Guided backpropagation (Springenberg et al. 2015): largest |gradient| among the colours.

    Its sign says in which direction a pixel would have to change, not whether it speaks for the
    class.

    Raises:
        MethodNotApplicable: the model has no ReLU, or other rectifiers.
    """
    gradients = yield from _guided(subject)
    return gradients.abs().amax(_COLOURS)


def guided_gradcam(subject: Subject) -> Steps:
    """Guided Grad-CAM (Selvaraju et al. 2017, section 3.2): `guided_backprop` times Grad-CAM.

    Raises:
        MethodNotApplicable: the model has no ReLU, or other rectifiers.
    """
    maps = gradcam(subject.captured)
    gradients = yield from _guided(subject)
    size = gradients.shape[-2:]
    maps = nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)[0]
    return gradients.abs().amax(_COLOURS) * maps


def smoothgrad(subject: Subject) -> Steps:
    """SmoothGrad (Smilkov et al. 2017): largest |mean gradient| among the colours.

    The mean is over noisy copies of the input. The noise is normal, with 0.15 of the input's range
    as standard deviation; every target sees the same noise.
    """
    return _noisy_gradients(subject, lambda mean, _: mean.abs().amax(_COLOURS))


def vargrad(subject: Subject) -> Steps:
    """VarGrad (Adebayo et al. 2018): variance over noisy copies, summed over the colours.

    E[(a - E a)^2], kept up by Welford's recurrence whose every term is a square: it cannot be
    negative. Noise as in `smoothgrad`.
    """
    return _noisy_gradients(subject, lambda _, variance: variance.sum(_COLOURS))


def integrated_gradients(subject: Subject) -> Generator[Step, Any, NotedMaps]:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1), summed over the colours, signed.

    (x - b) times the mean gradient on the straight line from b, a black image, to x; the mean is
    taken by Gauss-Legendre quadrature with `steps` points. The note of each map says how far its
    sum is from y(x) - y(b), which it would be with infinitely many points.
    """
    black = _black(subject)
    difference = subject.inputs.float() - black
    dtype = subject.inputs.dtype
    nodes, weights = _quadrature(subject.steps, black.device)
    unlit: Tensor = yield Forward(black.to(dtype))
    gains = (subject.scores(subject.logits[None]) - subject.scores(unlit))[0].tolist()
    sums = torch.zeros_like(difference).repeat(len(gains), 1, 1, 1)

    def maps() -> Tensor:
        return (difference * sums).sum(_COLOURS)

    for t, target in enumerate(subject.targets):
        size = subject.gradient_chunk
        parts = zip(nodes.split(size), weights.split(size), strict=True)
        for node, weight in parts:
            points = (black + node * difference).to(dtype)
            gradients, _ = yield InputGradient(points, (target,) * len(points), maps=maps)
            sums[t] += (weight * gradients).sum(0)
    found = maps()
    notes = [
        f"Completeness delta {float(pixels.sum()) - gain:.2g} of score difference {gain:.3g}."
        for pixels, gain in zip(found, gains, strict=True)
    ]
    return NotedMaps(found, tuple(notes))


def lrp(subject: Subject) -> Generator[Step, Any, NotedMaps]:
    """Layer-wise relevance propagation (Bach et al. 2015), signed.

    The composite is that of Montavon et al. 2019: the epsilon rule in linear layers, the gamma rule
    in convolutions, the box rule at the pixels. That relevance is conserved is checked for each
    map; its note says how much of the score reached the pixels, the rest being what biases and
    stabilisers hold.

    Raises:
        MethodNotApplicable: relevance is not conserved in the model.
    """
    explained = Explained(
        module=subject.module,
        read=subject.read,
        inputs=subject.inputs,
        low=_black(subject),
        high=_white(subject),
        logits=subject.logits,
        changes=subject.changes(1),
    )
    found: list[tuple[Tensor, str]] = []
    for targets in subject.target_chunks(cost=_RULES_COST):
        run = partial(relevance, explained, targets)
        found += yield from run_unbatched(run, cost=_RULES_COST * len(targets))
    return NotedMaps(torch.stack([pixels for pixels, _ in found]), tuple(note for _, note in found))


def _gradients(subject: Subject) -> Generator[Step, Any, Tensor]:
    """Gradients dx y of every target, (T, 3, H, W)."""
    found = []
    for targets in subject.target_chunks(cost=3):
        inputs = subject.inputs.expand(len(targets), -1, -1, -1)
        gradients, _ = yield InputGradient(inputs, targets)
        found.append(gradients)
    return torch.cat(found)


def _guided(subject: Subject) -> Steps:
    """Guided gradients of every target, (T, 3, H, W)."""
    return run_by_targets(subject, partial(guided_gradients, subject), cost=3)


def _noisy_gradients(subject: Subject, reduce: Callable[[Tensor, Tensor], Tensor]) -> Steps:
    """Maps from mean and variance, (T, 3, H, W) each, of dx y over `samples` noisy copies of x."""
    x = subject.inputs.float()
    spread = _NOISE * (x.max() - x.min())
    generator = subject.generator()
    mean = x.new_zeros(len(subject.targets), *x.shape[1:])
    squares = torch.zeros_like(mean)

    def maps(count: int) -> Tensor:
        return reduce(mean, squares / count)

    for start in range(0, subject.samples, subject.gradient_chunk):
        count = min(subject.gradient_chunk, subject.samples - start)
        # Drawn one by one, so that the size of a chunk does not change what a copy gets.
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for _ in range(count)])
        noisy = (x + spread * noise.to(x.device)).to(subject.inputs.dtype)
        for t, target in enumerate(subject.targets):
            step = InputGradient(noisy, (target,) * count, maps=partial(maps, max(start, 1)))
            gradients, _ = yield step
            for seen, gradient in enumerate(gradients, start + 1):
                surprise = gradient - mean[t]
                mean[t] += surprise / seen
                squares[t] += surprise.square() * (1 - 1 / seen)
    return maps(subject.samples)


@lru_cache(maxsize=32)
def _quadrature(points: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and weights that sum to 1, (points, 1, 1, 1) each."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    unit = np.stack([(nodes + 1) / 2, weights / 2])
    both = torch.tensor(unit, dtype=torch.float32, device=device)
    return both[0].view(-1, 1, 1, 1), both[1].view(-1, 1, 1, 1)


def _black(subject: Subject) -> Tensor:
    """A black image as the model takes it, float32 of the input's shape."""
    return subject.black.expand(subject.inputs.shape)


def _white(subject: Subject) -> Tensor:
    """A white image as the model takes it, float32 of the input's shape."""
    return subject.white.expand(subject.inputs.shape)
