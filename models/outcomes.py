"""From the shared pass of a batch to each job's outcome: its maps and its statistics."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn

from models.cuda.staging import indices
from models.errors import InternalError, InvalidOption
from models.faithfulness.measures import FaithfulnessTest, images_per_map
from models.host_results import HostResults
from models.methods import METHODS, implementation
from models.methods.table import images_of
from models.phases import Phases
from models.readout import Read, own_columns
from models.shared_pass import SharedPass
from models.statistics import Summary, describe, summarise
from models.steps import NotedMaps, Step, Subject
from models.targets import ResolvedTarget, predictions
from models.types import (
    ClassScore,
    Explanation,
    Fuse,
    Job,
    JobOptions,
    Kind,
    LayerFeatures,
    Outcome,
)
from models.warm_model import WarmModel

_SIGNED_LAYER = "The layer has negative values, for which this method is not derived."


class BatchOutcomes:
    """The outcomes of one batch.

    Maps of the methods that need nothing but the shared pass are there from the beginning
    (`HostResults`); `steps` then finishes each job, yielding steps where its methods need further
    passes.
    """

    def __init__(self, warm: WarmModel, jobs: Sequence[Job], shared: SharedPass) -> None:
        """Args: the model, the batch and what its pass gave."""
        self._warm = warm
        self._jobs = jobs
        self._shared = shared
        self._host = HostResults(jobs, shared)
        self._predictions = predictions(
            self._host.logits,
            self._host.probabilities,
            self._host.order[:, : max(job.options.top_k for job in jobs)],
        )
        self._finite = np.isfinite(self._host.logits).all(1)
        self._summaries = _summaries(shared)

    def read(self, row: int) -> Read:
        """How the network's output is read for an image."""
        return self._shared.reads[row]

    def steps(self, row: int, phases: Phases) -> Generator[Step, Any, Outcome]:
        """Finish one job: yields the steps it still needs and returns its outcome.

        It begins the job's phases.

        Raises:
            InvalidOption: the model's scores are not finite after the job's interventions.
            InternalError: they are not finite.
        """
        job = self._jobs[row]
        if not self._finite[row]:
            if job.options.interventions:
                raise InvalidOption(
                    "With these interventions the model's scores are not finite.",
                    field="interventions",
                )
            raise InternalError("The model's scores for this image are not finite.")
        explanations: list[Explanation] = []
        phases.later = self._plan(row)
        for name in job.options.methods:
            explanations += yield from self._explain(name, row, phases)
        if job.options.faithfulness:
            phases.begin("faithfulness")
            explanations = yield from self.test(explanations, row, options=job.options)
        return Outcome(
            id=job.id,
            predictions=self._predictions[row][: job.options.top_k][: own_columns(job)],
            explanations=tuple(explanations),
            statistics=tuple(self._describe(row)),
            embedding=self._host.logits[row] if self._is_vector(row) else None,
        )

    def _is_vector(self, row: int) -> bool:
        """Whether the scores of an image are its vector."""
        return self._warm.task == "embedding" and self._jobs[row].other is None

    def _plan(self, row: int) -> list[int]:
        """Images that each phase of a job is expected to run through the network, in order."""
        options, targets = self._jobs[row].options, len(self._host.targets[row])
        plan, maps = [], 0
        for name in options.methods:
            layers = self._layers(name, self._jobs[row])
            maps += targets * (len(layers) if options.fuse == "none" else 1)
            plan += [
                images_of(
                    METHODS[name],
                    samples=options.samples,
                    steps=options.steps,
                    targets=targets,
                    channels=self._warm.channels(layer) or 0,
                )
                for layer in layers
                if self._host.map(layer, name, row) is None
            ]
        if options.faithfulness:
            pixels = self._shared.inputs[row, 0].numel()
            # Random maps of one size are tried once.
            plan.append((maps + 1) * images_per_map(options.faithfulness, pixels))
        return plan

    def _explain(
        self, name: str, row: int, phases: Phases
    ) -> Generator[Step, Any, list[Explanation]]:
        """Explanations by one method, in the order target → layer."""
        job, targets = self._jobs[row], self._host.targets[row]
        maps: dict[str, np.ndarray] = {}
        notes: dict[str, tuple[str, ...]] = {}
        layers = self._layers(name, job)
        is_fused = job.options.fuse != "none" and len(layers) > 1

        def explain(layer: str, made: Tensor) -> list[Explanation]:
            values = made.cpu().numpy()
            return [
                self._explanation(name, layer, values[t], target, row)
                for t, target in enumerate(targets)
            ]

        for layer in layers:
            ready = self._host.map(layer, name, row)
            if ready is None:
                phases.begin(name, None if is_fused else partial(explain, layer))
                made = yield from implementation(name)(self._subject(name, layer, row))
                if isinstance(made, NotedMaps):
                    notes[layer] = made.notes
                    made = made.maps
                ready = made.cpu().numpy()
            maps[layer] = ready[: len(targets)]
        if is_fused:
            fused = fuse([torch.from_numpy(m) for m in maps.values()], job.options.fuse)
            maps = {"+".join(maps): fused.numpy()}
        return [
            self._explanation(
                name, layer, layer_maps[t], target, row, notes=notes.get(layer, ())[t : t + 1]
            )
            for t, target in enumerate(targets)
            for layer, layer_maps in maps.items()
        ]

    def test(
        self, explanations: Sequence[Explanation], row: int, *, options: JobOptions
    ) -> Generator[Step, Any, list[Explanation]]:
        """The explanations of an image with their faithfulness measured as the options say."""
        test = FaithfulnessTest(
            names=options.faithfulness,
            inputs=self._inputs(row),
            whole=self._shared.probabilities[row],
            chunk=self._warm.chunk,
            seed=options.seed or 0,
            curves=options.curves,
        )
        tested = []
        for explanation in explanations:
            measured = yield from test.steps(explanation)
            tested.append(structs.replace(explanation, faithfulness=measured))
        return tested

    def _inputs(self, row: int) -> Tensor:
        """One image as the model itself takes it."""
        return self._shared.inputs[row : row + 1].to(self._warm.dtype)

    @staticmethod
    def _layers(name: str, job: Job) -> tuple[str, ...]:
        """Layers a method explains; methods of the input itself have the one empty name."""
        return ("",) if METHODS[name].of_input else job.options.layers

    def _subject(self, name: str, layer: str, row: int) -> Subject:
        options, defaults = self._jobs[row].options, METHODS[name].defaults
        capture = None
        if layer:
            whole, rows = self._shared.captures[layer]
            place = indices([rows.index(row)], whole.activation.device)
            capture = whole.rows(place).first(len(self._host.targets[row]))
        asked = {"samples": options.samples, "steps": options.steps, "seed": options.seed}
        chosen = {k: defaults.get(k, 0) if v is None else v for k, v in asked.items()}
        warm = self._warm
        known = layer == warm.target_layer and not options.interventions
        return Subject(
            module=warm.module,
            task=warm.task,
            read=self._shared.reads[row],
            layouts=warm.layouts,
            black=warm.shift,
            white=warm.shift + 255 * warm.scale,
            interventions=options.interventions,
            inputs=self._inputs(row),
            logits=self._shared.logits[row, : own_columns(self._jobs[row])],
            targets=self._host.targets[row],
            capture=capture,
            layer=layer,
            head=warm.head if known else None,
            chunk=warm.chunk,
            **chosen,
        )

    def _explanation(
        self,
        name: str,
        layer: str,
        values: np.ndarray,
        target: ResolvedTarget,
        row: int,
        *,
        notes: tuple[str, ...] = (),
    ) -> Explanation:
        values = np.ascontiguousarray(values, dtype=np.float32)
        finite = bool(np.isfinite(values).all())
        values = values if finite else np.zeros_like(values)
        return Explanation(
            method=name,
            layer=layer,
            target=self._score(target.cls, row),
            map=values,
            signed=METHODS[name].signed,
            degenerate=bool(values.max() == values.min()),
            warnings=(*notes, *self._warnings(name, layer, row, finite=finite)),
        )

    def _warnings(self, name: str, layer: str, row: int, *, finite: bool) -> list[str]:
        warnings = [] if finite else ["The map was not finite and is shown as empty."]
        assumes = METHODS[name].assumes_nonnegative
        if assumes and any(self._host.has_negative(part, row) for part in layer.split("+")):
            warnings.append(_SIGNED_LAYER)
        return warnings

    def _score(self, index: int, row: int) -> ClassScore:
        return ClassScore(
            class_id=index,
            score=float(self._host.logits[row, index]),
            probability=float(self._host.probabilities[row, index]),
        )

    def _describe(self, row: int) -> Generator[LayerFeatures, None, None]:
        """Statistics of one image, in the order layer → kind → target."""
        options = self._jobs[row].options
        for layer in options.layers:
            for kind in options.kinds if self._jobs[row].operation == "features" else ("output",):
                gradient = kind.startswith("grad_")
                targets = self._host.targets[row] if gradient else (None,)
                by_target = self._summaries.get((layer, kind, row), [])
                for summary, target in zip(by_target, targets, strict=False):
                    if summary is not None:
                        yield describe(
                            summary,
                            layer=layer,
                            kind=kind,
                            top=options.channels,
                            weights=self._weights(layer, row),
                            target=None if target is None else target.cls,
                            grid=options.grid,
                        )

    def _weights(self, layer: str, row: int) -> np.ndarray | None:
        """Weights by the first of the job's methods that defines them."""
        for name in self._jobs[row].options.methods:
            weights = self._host.weights(layer, name, row)
            if weights is not None:
                return weights
        return None


def fuse(maps: Sequence[Tensor], how: Fuse) -> Tensor:
    """Fuse maps of several layers into one.

    The maps (T, h, w) are upsampled to the finest one's size (bilinear, half-pixel centres) and
    scaled to [0, 1] by their own range, so that layers count alike whatever the size of their
    values; a constant map counts as 0.
    """
    height, width = max((m.shape[-2:] for m in maps), key=lambda size: size[0] * size[1])
    scaled = torch.stack([_unit(_resize(m, (height, width))) for m in maps])
    if how == "max":
        return scaled.amax(0)
    return scaled.prod(0) if how == "product" else scaled.mean(0)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    resized = nn.functional.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
    return resized[:, 0]


def _unit(maps: Tensor) -> Tensor:
    low = maps.amin((-2, -1), keepdim=True)
    span = maps.amax((-2, -1), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / torch.where(span > 0, span, 1.0), 0.0)


def _summaries(shared: SharedPass) -> dict[tuple[str, Kind, int], list[Summary | None]]:
    """By layer, kind and row of the batch: a summary for each target.

    It is None where the layer has no part in the target's score.
    """
    found = [r for by_target, _ in shared.reductions.values() for r in by_target if r is not None]
    finished = iter(summarise(found))
    summaries: dict[tuple[str, Kind, int], list[Summary | None]] = {}
    for (layer, kind), (by_target, rows) in shared.reductions.items():
        for reductions in by_target:
            images = [None] * len(rows) if reductions is None else next(finished)
            for row, summary in zip(rows, images, strict=True):
                summaries.setdefault((layer, kind, row), []).append(summary)
    return summaries
