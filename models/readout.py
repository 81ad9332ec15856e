"""From what a network returns to scores where that differs from image to image.

A classifier's scores are what it returns. The one score of an embedding is its cosine with a vector
that its job brings, which is held fixed. Those of a segmentation network are means over pixels that
belong to one image: every job has a reading of its own, so that no job's pixels count in another's
scores. Engine and methods see rows of scores (n, columns) in any case.

Column c of a segmentation network is class c over the pixels that it wins in the unchanged image, or
the whole image where it wins none. With areas, `classes` further columns follow for each of them. The
mean over pixels is the sum of Seg-Grad-CAM (Vinogradova et al. 2020, arXiv:2002.11434) divided by
their number, so that scores of small and large regions compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from models.targets import class_maps, class_scores
from models.types import Job, Task

PER_JOB: tuple[Task, ...] = ("segmentation", "embedding")
"""Tasks whose output each job reads in its own way."""

Read = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Scores and probabilities, float32 (n, columns) each, of a network's output for n images."""

ReadTexts = Callable[[tuple[str, ...]], Read]
"""How vectors are read as scores of some texts."""


@dataclass(frozen=True, eq=False)
class RegionScores:
    """Reads a segmentation network's output for one image, changed in n ways or not at all.

    The probability of a class is the mean of its probabilities at the pixels of the image, or of the
    area: the share of them that is expected to be of the class.

    Attributes:
        won: (h · w,) class of each pixel of the unchanged image.
        areas: float32 (areas, h · w), weights of each area's pixels that add up to 1.
    """

    won: Tensor
    areas: Tensor

    @classmethod
    def of(cls, output: Tensor, areas: np.ndarray | None) -> RegionScores:
        """The reading of an image by its output (1, C, h, w), with areas (areas, H, W) or none."""
        maps = class_maps(output.detach())
        weights = maps.new_zeros(0, *maps.shape[2:])
        if areas is not None:
            drawn = torch.from_numpy(areas.copy()).to(maps.device).float()
            weights = nn.functional.adaptive_avg_pool2d(drawn, (maps.shape[2], maps.shape[3]))
            weights = weights / weights.sum((1, 2), keepdim=True)
        return cls(won=maps[0].argmax(0).flatten(), areas=weights.flatten(1))

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and probabilities of n outputs (n, C, h, w)."""
        values = class_maps(output).flatten(2)
        images, classes, _ = values.shape
        own = values.gather(1, self.won.expand(images, 1, -1))[:, 0]
        counts = self.won.bincount(minlength=classes)
        sums = values.new_zeros(images, classes).index_add(1, self.won, own)
        scores = torch.where(counts > 0, sums / counts.clamp_min(1), values.mean(2))
        at_pixels = values.detach()
        at_pixels = at_pixels.sigmoid() if output.shape[1] == 1 else at_pixels.softmax(1)
        return (
            torch.cat([scores, self._by_area(values)], 1),
            torch.cat([at_pixels.mean(2), self._by_area(at_pixels)], 1),
        )

    def _by_area(self, values: Tensor) -> Tensor:
        """Means of (n, C, h · w) over each area, (n, areas · C)."""
        return torch.einsum("ap,ncp->nac", self.areas, values).flatten(1)


@dataclass(frozen=True, eq=False)
class Similarity:
    """Reads vectors (n, values) as their cosine with a vector (values,), one column."""

    reference: Tensor

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines of n vectors, twice: they take the place of probabilities, too."""
        cosines = nn.functional.cosine_similarity(output.float(), self.reference[None])[:, None]
        return cosines, cosines.detach()


@dataclass(frozen=True, eq=False)
class TextScores:
    """Reads vectors (n, values) as scores of texts.

    Attributes:
        weights: float32 (texts, values).
        bias: of every score, (1,), if there is one.
        task: how probabilities are made of them.
    """

    weights: Tensor
    bias: Tensor | None
    task: Task

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and probabilities (n, texts)."""
        scores = nn.functional.linear(output.float(), self.weights)
        return class_scores(scores if self.bias is None else scores + self.bias, self.task)


def _vectors(output: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors themselves, for jobs that want no more."""
    vectors = output.float()
    return vectors, vectors.detach()


def readings(
    task: Task, jobs: Sequence[Job], output: Tensor, *, texts: ReadTexts | None = None
) -> list[Read]:
    """How the output of each job's image is read, in this pass and in all that follow for it.

    `texts` is given for networks whose classes are texts.
    """
    if texts is not None:
        # A pass that only proves that the device works has no labels.
        named = (job.options.labels for job in jobs)
        return [texts(labels) if labels else plain(task) for labels in named]
    if task == "segmentation":
        images = output.split(1)
        return [RegionScores.of(o, job.areas) for o, job in zip(images, jobs, strict=True)]
    if task == "embedding":
        return [_similarity(jobs, row, output) for row in range(len(jobs))]
    return [plain(task)] * len(jobs)


def _similarity(jobs: Sequence[Job], row: int, output: Tensor) -> Read:
    """Of two images that are compared, one follows the other, each with the vector of the other."""
    if (reference := jobs[row].reference) is not None:
        return Similarity(torch.from_numpy(reference.copy()).to(output.device))
    if jobs[row].other is None:
        return _vectors
    # A copy: what was computed in inference mode takes no part in the gradients of later passes.
    return Similarity(output[row ^ 1].detach().float().clone())


@cache
def plain(task: Task) -> Read:
    """The reading that all images share, one object for each task."""
    return partial(class_scores, task=task)


def read(reads: Sequence[Read], output: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scores and probabilities of a batch, the first `sizes[0]` rows by the first reading, and so on."""
    if all(reading is reads[0] for reading in reads):
        return reads[0](output)
    parts = zip(reads, output.split(list(sizes)), strict=True)
    scores, probabilities = zip(*(reading(part) for reading, part in parts), strict=True)
    # Finite, so that no gradient through it is undefined.
    lowest = torch.finfo(scores[0].dtype).min
    return _stacked(scores, fill=lowest), _stacked(probabilities, fill=0.0)


def _stacked(parts: Sequence[Tensor], *, fill: float) -> Tensor:
    """Rows of all parts, the shorter ones filled up."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat(
        [nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
    )


def own_columns(job: Job) -> int | None:
    """How many columns are a job's own where `read` may have filled up its rows; None: all are."""
    return len(job.options.labels) or None


def columns(job: Job) -> int:
    """A number that jobs whose rows of scores have one length share."""
    if job.other is not None:
        return -1
    return 0 if job.areas is None else len(job.areas)
