"""Methods that change the input or a layer and look at how the scores change.

Each function is a generator of steps for one `Subject` and returns float32 maps (T, h, w), not
normalised. Every step is at most one chunk of images, whose perturbations are made just before it:
memory does not grow with the number of channels, windows or masks. All T targets are read from the
same passes. Perturbed inputs live in normalised space, where 0 is the mean colour of the model's
preprocessing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.methods._ablation import closed_form_drops, replayed_drops
from models.steps import Forward, NotedMaps, Step, Steps, Subject

GRID = 7
KEPT = 0.5
SMOOTHING = 2.0
"""Standard deviation of SS-CAM's noise, in units of a mask's range."""


def scorecam(subject: Subject) -> Generator[Step, Any, NotedMaps]:
    """Score-CAM (Wang et al. 2020, algorithm 1), for T targets at once.

    M = ReLU(sum_k w_k A_k), w = softmax over channels of y_c(X * H_k), H_k = minmax(upsample(A_k)).
    Scores are logits; the score of the baseline image, subtracted in the paper, cancels in the
    softmax. Constant channels make no mask and have weight 0.

    One forward for each channel is nearly all of what this costs. If `samples` says so, only that
    many channels of most energy (sum of squares) take part and the others have weight 0: the map
    approximates the paper's, and a note says so.
    """
    channels = varying_channels(_activation(subject))
    notes: tuple[str, ...] = ()
    if 0 < subject.samples < len(channels):
        note = f"Made from the strongest {subject.samples} of {len(channels)} channels."
        notes = (note,) * len(subject.targets)
        energy = _activation(subject)[channels].square().sum((1, 2))
        channels = channels[energy.argsort(descending=True, stable=True)[: subject.samples]]
    maps = yield from _score_weighted(subject, channels, [lambda masks: masks], count=1)
    return NotedMaps(maps, notes)


def ss_cam(subject: Subject) -> Steps:
    """SS-CAM (Wang, Naidu et al. 2020): Score-CAM with scores averaged over noisy masks.

    y_k = mean over N samples of y_c(X * (H_k + noise)), noise ~ N(0, 2^2) at every pixel. The same
    N fields of noise are laid over every channel's mask, so that channels differ by their masks
    alone.
    """
    channels = varying_channels(_activation(subject))
    return _score_weighted(subject, channels, _noises(subject), count=subject.samples)


def is_cam(subject: Subject) -> Steps:
    """IS-CAM (Naidu et al. 2020): Score-CAM with scores integrated from no mask to the whole.

    y_k = mean over i = 1 … N of y_c((i / N) X * H_k).
    """
    shares = [(i + 1) / subject.samples for i in range(subject.samples)]
    channels = varying_channels(_activation(subject))
    return _score_weighted(subject, channels, map(_scaling, shares), count=subject.samples)


def ablationcam(subject: Subject) -> Steps:
    """Ablation-CAM (Desai and Ramaswamy 2020).

    M = ReLU(sum_k w_k A_k), w_k = (y_c - y_c with A_k = 0) / |y_c|. The paper divides by y_c
    itself, which turns the map over where the score is negative. Global average pooling followed by
    one linear layer needs no pass: y_c - y_k = W_ck mean(A_k).
    """
    drops = closed_form_drops(subject)
    if drops is None:
        drops = yield from replayed_drops(subject)
    size = subject.captured.score[0].abs()
    weights = drops / torch.where(size > 0, size, 1.0)
    return torch.einsum("kt,khw->thw", weights, _activation(subject)).relu_()


def occlusion(subject: Subject) -> Steps:
    """Occlusion (Zeiler and Fergus 2014): what the score loses when a window is grey, signed.

    The input is cut into (n + 1) x (n + 1) cells, n = `steps`; a window of 2 x 2 cells slides by
    one cell. A cell's value is the mean of y_c - y_c(occluded) over the windows that cover it.
    Windows are filled with 0 in normalised space, the mean colour.

    Returns:
        (T, n + 1, n + 1); fewer where the input has fewer pixels.
    """
    height, width = subject.inputs.shape[2:]
    rows, columns = min(subject.steps, height - 1), min(subject.steps, width - 1)
    edges_y, edges_x = _edges(height, rows + 1), _edges(width, columns + 1)
    windows = [(r, c) for r in range(rows) for c in range(columns)]
    whole = subject.scores(subject.logits[None])[0]
    sums = whole.new_zeros(len(whole), rows + 1, columns + 1)
    covering = whole.new_zeros(rows + 1, columns + 1)
    for first in range(0, len(windows), subject.chunk):
        part = windows[first : first + subject.chunk]
        occluded = subject.inputs.repeat(len(part), 1, 1, 1)
        for image, (r, c) in zip(occluded, part, strict=True):
            image[:, edges_y[r] : edges_y[r + 2], edges_x[c] : edges_x[c + 2]] = 0.0
        scores = yield Forward(occluded, maps=lambda: sums / covering.clamp_min(1))
        drops = whole - subject.scores(scores)
        for drop, (r, c) in zip(drops, part, strict=True):
            sums[:, r : r + 2, c : c + 2] += drop[:, None, None]
            covering[r : r + 2, c : c + 2] += 1
    return sums / covering


def rise(subject: Subject) -> Steps:
    """RISE (Petsiuk et al. 2018, eq. 6): random masks, weighted by the probability each leaves.

    M = 1 / (N p) sum_i f_c(X * m_i) m_i with N = `samples` masks from 7 x 7 grids, p = 0.5; f is
    the probability, as in the paper. Masks depend on the seed and the input size only.

    Returns:
        (T, H, W), the input's size.
    """
    height, width = subject.inputs.shape[2:]
    random = RandomMasks.draw(subject.samples, (height, width), subject.generator())
    sums = subject.logits.new_zeros(len(subject.targets), height * width)

    def mean(count: int) -> Tensor:
        return sums.view(-1, height, width) / (count * KEPT)

    for first in range(0, subject.samples, subject.chunk):
        last = min(first + subject.chunk, subject.samples)
        masks = random.masks(first, last, subject.inputs.device)
        masked, so_far = _masked(subject, masks[:, None]), partial(mean, first)
        shares = subject.scores((yield Forward(masked, probabilities=True, maps=so_far)))
        sums += shares.T @ masks.flatten(1)
    return mean(subject.samples)


def _score_weighted(
    subject: Subject,
    channels: Tensor,
    rounds: Iterable[Callable[[Tensor], Tensor]],
    *,
    count: int,
) -> Steps:
    """sum_k softmax_k(y_k) A_k over `channels`, y_k the mean score under k's mask over rounds.

    Each of the `count` rounds says what is done to a mask before it is laid over the input.
    """
    activation = _activation(subject)[channels]
    scores = activation.new_zeros(len(channels), len(subject.targets))
    seen = activation.new_zeros(len(channels), 1)

    def weighted() -> Tensor:
        """The map of the channels that were seen; the others have weight 0."""
        weights = torch.where(seen > 0, scores / seen, -torch.inf).softmax(0)
        return torch.einsum("kt,khw->thw", weights, activation).relu_()

    height, width = subject.inputs.shape[2:]
    left = count * len(channels)
    for change in rounds:
        for first in range(0, len(channels), subject.chunk):
            part = slice(first, first + subject.chunk)
            masks = change(unit_masks(activation[part], (height, width)))
            left -= len(masks)
            step = Forward(_masked(subject, masks), left=left, maps=weighted)
            scores[part] += subject.scores((yield step))
            seen[part] += 1
    return weighted()


def _activation(subject: Subject) -> Tensor:
    """The explained layer's channels, (K, h, w)."""
    return subject.captured.activation[0]


def _masked(subject: Subject, masks: Tensor) -> Tensor:
    """The input under each of (n, 1, H, W) masks, in the model's precision."""
    return subject.inputs * masks.to(subject.inputs.dtype)


def _noises(subject: Subject) -> Generator[Callable[[Tensor], Tensor], None, None]:
    generator = subject.generator()
    for _ in range(subject.samples):
        noise = SMOOTHING * torch.randn(subject.inputs.shape[2:], generator=generator)
        yield noise.to(subject.inputs.device).add


def _scaling(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda masks: masks * factor


def _edges(pixels: int, cells: int) -> list[int]:
    """Where each of `cells` cells begins, and where the last one ends."""
    return [round(i * pixels / cells) for i in range(cells + 1)]


# ---------------------------------------------------------------- masks


def varying_channels(activation: Tensor) -> Tensor:
    """Indices (long) of the channels of (K, h, w) that are not constant and so make a mask."""
    values = activation.flatten(1)
    return (values.amax(1) > values.amin(1)).nonzero().flatten()


def unit_masks(channels: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge channels to the input and scale each to [0, 1]: s(Up(A_k)) in the words of Score-CAM.

    Bilinear between pixel centres (`align_corners=False`, as in the authors' code), then min-max,
    so that every mask reaches both 0 and 1: (n, h, w), none constant, → float32 (n, 1, H, W).
    """
    masks = nn.functional.interpolate(channels[:, None], size, mode="bilinear", align_corners=False)
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    return (masks - low) / (high - low)


@dataclass(frozen=True)
class RandomMasks:
    """The masks of RISE (Petsiuk et al. 2018, section 3.2), kept as small grids.

    A mask is a random binary 7 x 7 grid, enlarged bilinearly to 8 x 8 cells and cropped at a random
    place within one cell. 4,000 grids take 0.2 MB and milliseconds to draw, their masks at 224 x
    224 would take 800 MB: masks are enlarged a chunk at a time and not kept.

    Attributes:
        grids: float32 (N, 7, 7), each 0 or 1.
        shifts: long (N, 2), the crop's first row and column.
        size: (H, W) of the masks.
    """

    grids: Tensor
    shifts: Tensor
    size: tuple[int, int]

    @classmethod
    def draw(cls, count: int, size: tuple[int, int], generator: torch.Generator) -> RandomMasks:
        """Draw `count` masks; each cell is kept with probability 1/2."""
        grids = (torch.rand(count, GRID, GRID, generator=generator) < KEPT).float()
        shifts = [torch.randint(cell, (count,), generator=generator) for cell in _cells(size)]
        return cls(grids=grids, shifts=torch.stack(shifts, 1), size=size)

    def masks(self, first: int, last: int, device: torch.device) -> Tensor:
        """Masks number `first` to `last` - 1: float32 (n, H, W) in [0, 1]."""
        grids = self.grids[first:last].to(device)
        shifts = self.shifts[first:last].to(device)
        rows, columns = (
            _enlarging(cell, device)[shift[:, None] + torch.arange(side, device=device)]
            for cell, side, shift in zip(_cells(self.size), self.size, shifts.T, strict=True)
        )
        return rows @ grids @ columns.mT


def _cells(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a cell in pixels."""
    return math.ceil(size[0] / GRID), math.ceil(size[1] / GRID)


def _enlarging(cell: int, device: torch.device) -> Tensor:
    """Weights (8 * cell, 7) that enlarge a side of the grid bilinearly."""
    unit = torch.eye(GRID, device=device)[None]
    side = (GRID + 1) * cell
    return nn.functional.interpolate(unit, side, mode="linear", align_corners=False)[0].T
