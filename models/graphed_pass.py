"""Shared passes that are recorded once, from images to maps, and replayed on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.capture import Capture
from models.cuda.graphs import Function
from models.cuda.staging import indices
from models.extractor import Extractor, Tap
from models.layers import to_map
from models.methods import METHODS, implementation
from models.shared_pass import SharedPass
from models.targets import class_scores, coded, look_up
from models.types import Job
from models.warm_model import WarmModel

_DECOMPOSING = ("eigencam", "eigengradcam", "kpca_cam")
"""Methods that wait for the device, because a decomposition reports whether it succeeded."""

GRAPHABLE = frozenset(
    name
    for name, method in METHODS.items()
    if method.cost in ("pass", "head") and name not in _DECOMPOSING
)


@dataclass(frozen=True)
class Plan:
    """What a recorded pass of a model does.

    Attributes:
        methods: names of the methods that explain the target layer, in alphabetical order.
        targets: classes that are explained for each image.
        rows: images.
    """

    methods: tuple[str, ...]
    targets: int
    rows: int


def plan_of(warm: WarmModel, jobs: Sequence[Job]) -> Plan | None:
    """The plan that answers a batch, or None where it needs a pass made for it.

    It explains the target layer, where the gradient is a row of the last linear layer, by methods
    of one pass. A plan serves a mixed batch by the union of its methods, the largest number of
    targets, and the next power of two images.
    """
    if (
        warm.reads_per_job
        or len(jobs) > warm.chunk
        or not all(_qualifies(warm, job) for job in jobs)
    ):
        return None
    explained = [job.options for job in jobs if job.options.methods]
    return Plan(
        methods=tuple(sorted({name for options in explained for name in options.methods})),
        targets=max([1, *(len(options.targets) for options in explained)]),
        rows=min(1 << (len(jobs) - 1).bit_length(), warm.chunk),
    )


def run_graphed(
    warm: WarmModel, jobs: Sequence[Job], *, module: nn.Module, images: Tensor
) -> SharedPass | None:
    """Run the shared pass as a recorded one, with the arguments of `run_shared_pass`.

    What it returns is good until the next recorded pass; None where the pass must be run plainly.
    """
    # Recorded passes start at pixels.
    if warm.graphs is None or images.is_floating_point() or (plan := plan_of(warm, jobs)) is None:
        return None
    codes = indices([_codes(job, plan.targets) for job in jobs], images.device)
    outputs = warm.graphs.run(plan, _pass(warm, module, plan), (images, codes), rows=plan.rows)
    if outputs is None:
        return None
    inputs, logits, probabilities, order, *explained = outputs
    captures = {}
    if explained:
        assert warm.target_layer is not None
        activation, score, *_ = explained
        if not warm.head.reproduces(activation, logits, dtype=warm.dtype):
            return None
        capture = Capture(warm.target_layer, activation, None, score)
        captures[warm.target_layer] = (capture, list(range(len(jobs))))
    return SharedPass(
        inputs=inputs,
        logits=logits,
        probabilities=probabilities,
        order=order,
        reads=warm.readings(jobs, logits),
        captures=captures,
        reductions={},
        maps=dict(zip(plan.methods, explained[2:], strict=True)),
    )


def _qualifies(warm: WarmModel, job: Job) -> bool:
    options = job.options
    if job.operation == "features" or options.interventions or options.statistics:
        return False
    if not options.methods:
        return not options.layers
    return (
        warm.head.closed_form
        and options.layers == (warm.target_layer,)
        and GRAPHABLE.issuperset(options.methods)
        and not options.faithfulness
        and not any(target.against for target in options.targets)
    )


def _codes(job: Job, width: int) -> list[int]:
    """The job's targets as `look_up` takes them, filled up with the first one, or class 0."""
    codes = [target.cls for target in coded(job.options.targets)] if job.options.methods else []
    return [*codes, *(codes[:1] or [0]) * (width - len(codes))]


def _pass(warm: WarmModel, module: nn.Module, plan: Plan) -> Function:
    """The pass as a function of images (rows, H, W, 3) and codes (rows, T).

    It never waits for the device. It returns inputs, logits, probabilities and order, and, where
    anything is explained, activation, scores and the maps of each method.
    """
    layer, weight = warm.target_layer or "", warm.head.weight
    layout = warm.layouts.get(layer)
    tap = Tap(layer, "output", lambda tensor: to_map(tensor, layout).float())

    @torch.inference_mode()
    def run(images: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        inputs = warm.normalise(images)
        with Extractor(module, [tap] if plan.methods else []) as extractor:
            logits, probabilities = class_scores(extractor.forward(inputs), warm.task)
            activation = extractor.caught(layer, "output")
        order = logits.sort(dim=1, descending=True, stable=True).indices
        if not plan.methods:
            return inputs, logits, probabilities, order
        assert weight is not None
        classes = look_up(codes, order)
        pixels = activation.shape[-2] * activation.shape[-1]
        gradient = (weight[classes] / pixels)[..., None, None]
        capture = Capture(layer, activation, gradient, logits.gather(1, classes))
        maps = (implementation(name)(capture) for name in plan.methods)
        return (inputs, logits, probabilities, order, activation, capture.score, *maps)

    return run
