"""Measures of faithfulness: the model's answers as a map's pixels are kept, removed or restored.

All measures look at the probability p of the map's class and stand beside the same measure of a
random map of the same size. Maps are enlarged to the input bilinearly, as they are drawn. Pixels
are ranked from the map's greatest value to its least; equal values are ranked in reading order, so
that a map with many zeros removes exactly as many pixels as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from msgspec import UNSET, UnsetType
from torch import Tensor

from models.faithfulness.pixel_removal import (
    IMPUTED_SHARES,
    Original,
    Perturbed,
    curve_counts,
    deleted,
    imputed,
    inserted,
    kept,
)
from models.steps import Forward, Step
from models.types import Curve, Explanation, Faithfulness


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        perturb: the changed inputs it needs, by a map; measures that share them share their passes.
        reduce: `reduce(p, whole, pixels)` from the class's probability on each of them and on the
            image itself.
        curve: what `reduce` makes its number from, of the same arguments: shares (n,) of the pixels
            and the value at each; None where it is not a curve.
    """

    perturb: Callable[[Original, Tensor], Perturbed]
    reduce: Callable[[Tensor, Tensor, int], float]
    curve: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None


class FaithfulnessTest:
    """Measures the maps of one image.

    Passes with random maps answer for all classes, so they are made once for each size of map.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        inputs: Tensor,
        whole: Tensor,
        chunk: int,
        seed: int,
        curves: bool = False,
    ) -> None:
        """Prepare the measures of these names.

        `inputs` are normalised, (1, 3, H, W), in the model's precision; `whole` (classes,) are the
        probabilities of the image itself; a step holds at most `chunk` images; `curves` asks for
        the curves, too.
        """
        self._measures = {name: MEASURES[name] for name in names}
        self._dtype = inputs.dtype
        self._original = Original(inputs[0].float(), seed)
        self._whole = whole
        self._chunk = chunk
        self._curves = curves
        self._random: dict[tuple[int, int], dict[str, Tensor]] = {}

    def steps(self, explanation: Explanation) -> Generator[Step, Any, dict[str, Faithfulness]]:
        """Measure one map; yields the passes it needs and returns each measure by name."""
        values = torch.from_numpy(explanation.map).to(self._original.inputs.device)
        shape = (values.shape[0], values.shape[1])
        if shape not in self._random:
            self._random[shape] = yield from self._answers(self._original.random_map(shape))
        answers, random = (yield from self._answers(values)), self._random[shape]
        index = explanation.target.class_id
        whole, pixels = self._whole[index].cpu().double(), self._original.pixels
        found = {}
        for name, measure in self._measures.items():
            own, other = (p[name][:, index].double() for p in (answers, random))
            curve: Curve | UnsetType = UNSET
            if self._curves and measure.curve is not None:
                share, values = measure.curve(own, whole, pixels)
                _, baseline = measure.curve(other, whole, pixels)
                curve = Curve(
                    share=tuple(share.tolist()),
                    value=tuple(values.tolist()),
                    random=tuple(baseline.tolist()),
                )
            found[name] = Faithfulness(
                value=measure.reduce(own, whole, pixels),
                random=measure.reduce(other, whole, pixels),
                curve=curve,
            )
        return found

    def _answers(self, values: Tensor) -> Generator[Step, Any, dict[str, Tensor]]:
        """Probabilities (n, classes) of each measure's changed inputs; measures share steps."""
        kinds = dict.fromkeys(measure.perturb for measure in self._measures.values())
        sequences = [perturb(self._original, values) for perturb in kinds]
        found: list[Tensor] = []
        waiting: list[Tensor] = []
        for sequence in sequences:
            first = 0
            while first < sequence.count:
                room = self._chunk - sum(map(len, waiting))
                last = min(sequence.count, first + min(room, sequence.at_once or room))
                waiting.append(sequence.make(first, last))
                if sequence.at_once or last - first == room:
                    found.append((yield self._step(waiting)))
                    waiting = []
                first = last
        if waiting:
            found.append((yield self._step(waiting)))
        parts = torch.cat([p.cpu() for p in found]).split(
            [sequence.count for sequence in sequences]
        )
        by_kind = dict(zip(kinds, parts, strict=True))
        return {name: by_kind[measure.perturb] for name, measure in self._measures.items()}

    def _step(self, parts: Sequence[Tensor]) -> Forward:
        return Forward(torch.cat(list(parts)).to(self._dtype), probabilities=True)


def average_drop(p: Tensor, whole: Tensor, _: int) -> float:
    """max(0, whole - p) / whole through the map (Chattopadhay et al. 2018); low is good."""
    return float((whole - p[0]).clamp_min(0) / whole) if bool(whole > 0) else 0.0


def increase(p: Tensor, whole: Tensor, _: int) -> float:
    """Whether the image has more probability through the map than whole, as 1 or 0.

    From Chattopadhay et al. 2018; only its mean over many images says much.
    """
    return float(p[0] > whole)


def deletion(p: Tensor, whole: Tensor, pixels: int) -> float:
    """Area under p as pixels turn grey (Petsiuk et al. 2018); low is good."""
    share, values = deletion_curve(p, whole, pixels)
    return float(torch.trapezoid(values, share))


def deletion_curve(p: Tensor, whole: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """The probability by the share of the pixels that are grey, 0 … 1."""
    return _shares(pixels), torch.cat([whole[None], p])


def insertion(p: Tensor, whole: Tensor, pixels: int) -> float:
    """Area under p as pixels return to the blurred image (Petsiuk et al. 2018); high is good."""
    share, values = insertion_curve(p, whole, pixels)
    return float(torch.trapezoid(values, share))


def insertion_curve(p: Tensor, whole: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """The probability by the share of the pixels that are back, 0 … 1."""
    return _shares(pixels), torch.cat([p, whole[None]])


def road(p: Tensor, whole: Tensor, pixels: int) -> float:
    """Half of p's gain when the last-ranked pixels are removed instead of the first-ranked ones.

    ROAD: mean over the removed shares of (p without the last-ranked - p without the first-ranked) /
    2, imputed as in Rong et al. 2022; in [-0.5, 0.5], high is good, and a random map is about 0.
    """
    return float(road_curve(p, whole, pixels)[1].mean())


def road_curve(p: Tensor, _: Tensor, __: int) -> tuple[Tensor, Tensor]:
    """Half of the gain by the share of the pixels that are removed."""
    first_gone, last_gone = p.split(len(IMPUTED_SHARES))
    return torch.tensor(IMPUTED_SHARES, dtype=torch.float64), (last_gone - first_gone) / 2


MEASURES = {
    "average_drop": Measure(kept, average_drop),
    "increase": Measure(kept, increase),
    "deletion": Measure(deleted, deletion, deletion_curve),
    "insertion": Measure(inserted, insertion, insertion_curve),
    "road": Measure(imputed, road, road_curve),
}
"""Every measure by name."""


def images_per_map(names: Sequence[str], pixels: int) -> int:
    """Changed inputs that the measures of these names try for each map."""
    on_curve = len(curve_counts(pixels)) - 1
    counts: dict[Callable[[Original, Tensor], Perturbed], int] = {
        kept: 1,
        deleted: on_curve,
        inserted: on_curve,
        imputed: 2 * len(IMPUTED_SHARES),
    }
    return sum(counts[perturb] for perturb in {MEASURES[name].perturb for name in names})


def _shares(pixels: int) -> Tensor:
    return curve_counts(pixels).double() / pixels
