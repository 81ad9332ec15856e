"""Cuts a job whose first pass would be too long into parts that are not. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from msgspec import structs

from models.methods import METHODS
from models.price import exceeds_step
from models.types import JobOptions, Kind, ModelInfo, Operation


@dataclass(frozen=True)
class Slice:
    """One part of a job.

    Attributes:
        options: what the part asks for.
        first_target: place of its first target among those of the job.
    """

    options: JobOptions
    first_target: int = 0


def slices(operation: Operation, options: JobOptions, info: ModelInfo) -> Iterator[Slice]:
    """Parts of a job that ask for the same maps and statistics, each in a first pass of a step.

    Targets are divided among parts first, as far as the methods look at them: every part runs
    forward again, but not backward for the same target. What is too much for one target, or does
    not depend on targets, is divided by layers, of which those that follow each other share a part.
    Maps are not fused and not measured in the parts.
    """
    whole = structs.replace(options, fuse="none", faithfulness=())

    def fits(part: JobOptions) -> bool:
        return not exceeds_step(operation, part, info)

    if operation == "features":
        divide = _by_targets if any(map(_is_gradient, options.kinds)) else _by_layers
        yield from divide(whole, fits)
        return
    of_input = tuple(name for name in options.methods if METHODS[name].of_input)
    if of_input:
        yield Slice(structs.replace(whole, methods=of_input, layers=(), statistics=False))
    others = [name for name in options.methods if name not in of_input]
    divided = tuple(name for name in others if METHODS[name].cost == "head")
    rest = tuple(name for name in others if name not in divided)
    described = options.statistics
    # Statistics go with the methods that give channels a weight.
    for methods in (divided, rest) if divided else (rest,):
        if methods or described:
            part = structs.replace(whole, methods=methods, statistics=described)
            yield from (_by_targets if methods == divided else _by_layers)(part, fits)
        described = False


def _by_targets(whole: JobOptions, fits: Callable[[JobOptions], bool]) -> Iterator[Slice]:
    size = max(1, len(whole.targets))
    while size > 1 and not fits(structs.replace(whole, targets=whole.targets[:size])):
        size = (size + 1) // 2
    for first in range(0, max(1, len(whole.targets)), size):
        part = structs.replace(whole, targets=whole.targets[first : first + size])
        if first:
            gradients = tuple(filter(_is_gradient, part.kinds))
            part = structs.replace(part, statistics=bool(gradients), kinds=gradients)
        yield from _by_layers(part, fits, first_target=first)


def _by_layers(
    whole: JobOptions, fits: Callable[[JobOptions], bool], *, first_target: int = 0
) -> Iterator[Slice]:
    waiting = list(whole.layers)
    while waiting:
        count = 1
        while count < len(waiting) and fits(_of(whole, waiting[: count + 1])):
            count += 1
        yield Slice(_of(whole, waiting[:count]), first_target)
        waiting = waiting[count:]


def _is_gradient(kind: Kind) -> bool:
    return kind.startswith("grad_")


def _of(whole: JobOptions, layers: Sequence[str]) -> JobOptions:
    return structs.replace(whole, layers=tuple(layers))
