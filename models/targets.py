"""From targets to scores and their gradient: per image, several targets, contrasts, ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from models.cuda.staging import indices
from models.types import ClassRef, ClassScore, Job, Target, Task

# Of float64's 53 bits, what 2 ** 22 columns leave apart, below the 24 bits of float32.
_HAIR = 2.0**-48


@dataclass(frozen=True)
class ResolvedTarget:
    """A target with its ranks looked up: explain class `cls`, less the mean of `against`."""

    cls: int
    against: tuple[int, ...] = ()


def class_scores(output: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Scores and probabilities of every class, float32 (N, classes) each, from the model's output.

    Softmax for single-label models, a sigmoid of each class for multi-label ones. A binary model
    has a single logit z and scores its two classes (-z, z), with probabilities sigmoid(-z) and
    sigmoid(z); one with two logits is loaded as a single-label model. The maps of a segmentation
    model are averaged over the image, and the vector of an embedding is summed, so that probes have
    scores; `models.readout` reads them for jobs.
    """
    if task == "segmentation":
        output = class_maps(output).mean((2, 3))
    if task == "embedding":
        output = output.sum(1, keepdim=True)
    logits = output.float()
    if task == "binary":
        logits = torch.cat([-logits, logits], 1)
        return logits, logits.detach().sigmoid()
    if task == "multi_label":
        return logits, logits.detach().sigmoid()
    return logits, logits.detach().softmax(1)


def class_maps(output: Tensor) -> Tensor:
    """Scores of every class at every pixel, float32 (N, classes, h, w); a single map tells two apart."""
    maps = output.float()
    return torch.cat([-maps, maps], 1) if maps.shape[1] == 1 else maps


def log_probabilities(scores: Tensor, task: Task) -> Tensor:
    """Logarithms of probabilities, finite and with a gradient however small the probability."""
    if task in ("multi_label", "binary"):
        return nn.functional.logsigmoid(scores)
    return scores.log_softmax(1)


def depth(jobs: Sequence[Job]) -> int:
    """How many of the best classes any job names or lists."""
    refs = [ref for job in jobs for t in job.options.targets for ref in (t.cls, *t.against)]
    ranks = [ref.value for ref in refs if ref.kind == "rank"]
    return max([*ranks, *(job.options.top_k for job in jobs)])


def ranked(
    scores: Tensor, probabilities: Tensor, *, classes: int, task: Task, count: int
) -> Tensor:
    """The best `count` columns of each image, best first, ties by lower index.

    By score, but by their share of the pixels for a segmentation model; each area has its own
    order, which is whole.
    """
    values = (probabilities if task == "segmentation" else scores).detach()
    if task != "segmentation" or values.shape[1] == classes:
        return _best(values, min(count, values.shape[1]))
    blocks = values.unflatten(1, (-1, classes))
    order: Tensor = blocks.sort(dim=2, descending=True, stable=True).indices
    first = torch.arange(0, values.shape[1], classes, device=values.device)
    return (order + first[:, None]).flatten(1)


def _best(values: Tensor, count: int) -> Tensor:
    """Columns of the largest float32 values, (N, columns) → (N, count); not by sorting them all."""
    # `topk` orders ties as it likes: in float64 each column gets a hair more than the next one, less
    # than what tells two float32 values apart. Few operations: in the middle of other work each
    # takes several times as long as alone.
    exact = values.double()
    size = exact.abs().add_(torch.finfo(exact.dtype).tiny / _HAIR)
    return exact.addcmul_(size, _hairs(values.shape[1], values.device)).topk(count, dim=1).indices


@lru_cache(maxsize=16)
def _hairs(columns: int, device: torch.device) -> Tensor:
    """What is added to each of some columns, in units of the value."""
    return torch.arange(columns, 0, -1, device=device, dtype=torch.float64) * _HAIR


def resolve_ranks(targets: Sequence[Target], order: Sequence[int]) -> tuple[ResolvedTarget, ...]:
    """Look up ranks in an image's classes, best first."""
    return _resolved(targets, lambda rank: int(order[rank - 1]))


def coded(targets: Sequence[Target]) -> tuple[ResolvedTarget, ...]:
    """Targets whose ranks are still to be looked up (`look_up`): rank r is coded as class -r."""
    return _resolved(targets, lambda rank: -rank)


def _resolved(targets: Sequence[Target], of: Callable[[int], int]) -> tuple[ResolvedTarget, ...]:
    def index(ref: ClassRef) -> int:
        return ref.value if ref.kind == "index" else of(ref.value)

    return tuple(ResolvedTarget(index(t.cls), tuple(map(index, t.against))) for t in targets)


def look_up(codes: Tensor, order: Tensor) -> Tensor:
    """Replace ranks in `codes` (N, T) by classes, which `order` (N, classes) has best first."""
    by_rank = order.gather(1, (-codes - 1).clamp_min(0))
    return torch.where(codes < 0, by_rank, codes)


class ScoreWeights:
    """Scores of T targets for each of N images as linear forms of their logits.

    Images with fewer targets than the most repeat their first one, those without any (predictions)
    class 0; callers drop what that yields.
    """

    def __init__(
        self,
        targets: Sequence[Sequence[ResolvedTarget]],
        device: torch.device,
        *,
        order: Tensor | None = None,
    ) -> None:
        """Make the linear forms.

        Args:
            targets: of each image.
            device: where the tensors live.
            order: classes of each image, best first, (N, classes), where the targets are `coded`.
        """
        self.width = max([1, *map(len, targets)])
        fill = [row[0] if row else ResolvedTarget(cls=0) for row in targets]
        padded = [
            [*row, *[other] * (self.width - len(row))]
            for row, other in zip(targets, fill, strict=True)
        ]
        self._padded, self._device, self._order = padded, device, order

    def rows(self, rows: Sequence[int]) -> ScoreWeights:
        """Those of some of the images, in ascending order."""
        if len(rows) == len(self._padded):
            return self
        order = None if self._order is None else self._order[indices(rows, self._device)]
        return ScoreWeights([self._padded[row] for row in rows], self._device, order=order)

    @cached_property
    def _index(self) -> Tensor:
        """Class of each target, (N, T); made when it is first used, since predictions use none."""
        codes = [[target.cls for target in row] for row in self._padded]
        if self._order is not None and all(code < 0 for row in codes for code in row):
            # As `look_up` does it, in one operation.
            ranks = indices([[-code - 1 for code in row] for row in codes], self._device)
            return self._order.gather(1, ranks)
        index = indices(codes, self._device)
        return index if self._order is None else look_up(index, self._order)

    @cached_property
    def _against(self) -> list[tuple[int, int, Tensor]]:
        """Image, target, and the classes that it is held against."""
        found = []
        for n, row in enumerate(self._padded):
            for t, target in enumerate(row):
                if target.against:
                    against = indices(target.against, self._device)
                    if self._order is not None:
                        against = look_up(against[None], self._order[n : n + 1])[0]
                    found.append((n, t, against))
        return found

    def of(self, values: Tensor) -> Tensor:
        """Apply the linear forms to logits, (N, C) → (N, T), keeping the graph."""
        scores = values.gather(1, self._index)
        if not self._against:
            return scores
        contrast = torch.zeros_like(scores)
        for n, t, against in self._against:
            contrast[n, t] = values[n, against].mean()
        return scores - contrast

    def of_rows(self, matrix: Tensor) -> Tensor:
        """Apply them to the rows of a matrix shared by all images, (C, K) → (N, T, K)."""
        rows = matrix[self._index]
        for n, t, against in self._against:
            rows[n, t] -= matrix[against].mean(0)
        return rows


def predictions(
    logits: np.ndarray, probabilities: np.ndarray, order: np.ndarray
) -> list[tuple[ClassScore, ...]]:
    """The best classes of each image, as `order` (N, k) ranks them."""
    rows = np.arange(len(order))[:, None]
    scores, shares = logits[rows, order].tolist(), probabilities[rows, order].tolist()
    return [
        tuple(
            ClassScore(class_id=c, score=s, probability=p)
            for c, s, p in zip(classes, row_scores, row_shares, strict=True)
        )
        for classes, row_scores, row_shares in zip(order.tolist(), scores, shares, strict=True)
    ]
