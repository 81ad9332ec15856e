"""Probe batches, and what a model and each of its modules return for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.hooks import HookStack
from models.targets import class_scores
from models.types import Preprocess, Task

PROBE_IMAGES = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What one module returned in one call of a probed forward.

    Attributes:
        name: dotted name of the module, followed by `#2` for its second call where it has several.
        path: dotted name of the module.
        output: the tensor, with its graph; None if the module returned anything but one tensor, or
            a quantised one, of which nothing can be computed.
        values: identifies the values at the moment of return: a block and its last module, a view
            and an identity share it, an in-place successor does not.
        checksum: see `row_checksum`.
        input_values: as `values`, of the module's first input.
        input_shape: of that input; empty if it is not a tensor.
    """

    name: str
    path: str
    module: nn.Module
    output: Tensor | None
    values: tuple[int, ...]
    checksum: tuple[float, float] | None = None
    input_values: tuple[int, ...] = ()
    input_shape: tuple[int, ...] = ()

    @property
    def overwritten(self) -> bool:
        """Whether an in-place operation changed the output after it was returned."""
        return self.output is not None and _version(self.output) != self.values[-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """One probed forward.

    Attributes:
        module: the model.
        probe: (N, 3, H, W), its input.
        scores: (N, classes), with the graph back to every recorded output.
        differentiable: whether that graph goes back to the input.
        calls: calls of all modules except the root, by name, in the order of their return.
        times: how often each module was called, by dotted name, in the order in which the model
            defines them.
    """

    module: nn.Module
    probe: Tensor
    scores: Tensor
    differentiable: bool
    calls: Mapping[str, Call]
    times: Mapping[str, int]

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the input."""
        return (self.probe.shape[2], self.probe.shape[3])

    def groups(self) -> list[list[Call]]:
        """Calls that returned the same values, the producer first, in the order of production."""
        groups: dict[tuple[int, ...], list[Call]] = {}
        for call in self.calls.values():
            if call.output is not None:
                groups.setdefault(call.values, []).append(call)
        return list(groups.values())


def largest_batch(module: nn.Module) -> int | None:
    """Most images that the layers of a network see at once, whatever it is given; None: all."""
    return getattr(module, "largest_batch", None)


def probe_batch(preprocess: Preprocess, *, images: int = PROBE_IMAGES) -> Tensor:
    """Return (images, channels, H, W) float32 of standard normal noise, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, preprocess.channels, *preprocess.crop, generator=generator)


def trace(module: nn.Module, task: Task, probe: Tensor) -> Trace:
    """Run a frozen model once with a hook on every module.

    All outputs and their graph are kept until the trace is dropped: about the memory of a training
    step on the probe, which has at least two images to tell batches from windows of one image, unless
    the model takes one at a time.
    """
    recorded: list[Call] = []
    times: Counter[str] = Counter()
    paths = {child: path for path, child in module.named_modules() if path}

    def record(child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        path = paths[child]
        times[path] += 1
        tensor = output if isinstance(output, Tensor) and not output.is_quantized else None
        given = args[0] if args and isinstance(args[0], Tensor) else None
        recorded.append(
            Call(
                name=f"{path}#{times[path]}",
                path=path,
                module=child,
                output=tensor,
                values=() if tensor is None else _values(tensor),
                checksum=None if tensor is None else row_checksum(tensor),
                input_values=() if given is None else _values(given),
                input_shape=() if given is None else tuple(given.shape),
            )
        )

    with torch.enable_grad(), HookStack() as hooks:
        for child in paths:
            hooks.forward(child, record)
        # Not the leaf itself: a model may work on its input in place.
        scores, _ = class_scores(module(probe.detach().requires_grad_().clone()), task)
    named = [replace(c, name=c.path) if times[c.path] == 1 else c for c in recorded]
    return Trace(
        module=module,
        probe=probe,
        scores=scores,
        differentiable=reaches_input(scores),
        calls={call.name: call for call in named},
        times={path: times[path] for path in paths.values() if path in times},
    )


def reaches_input(scores: Tensor, *, around: Tensor | None = None) -> bool:
    """Whether the recorded graph of a frozen network's scores goes back to its input.

    With `around`, whether it does so on a way that does not pass that tensor.
    """
    nodes = [scores.grad_fn]
    seen = set() if around is None else {around.grad_fn}
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


def row_checksum(tensor: Tensor) -> tuple[float, float] | None:
    """Mean and root mean square of what belongs to the first image, if dimension 0 is the image."""
    if tensor.ndim == 0 or not tensor.is_floating_point() or not tensor.numel():
        return None
    row = tensor.detach()[0].float()
    return float(row.mean()), float(row.square().mean().sqrt())


def _values(tensor: Tensor) -> tuple[int, ...]:
    return (
        tensor.untyped_storage().data_ptr(),
        int(tensor.storage_offset()),
        tensor.numel(),
        _version(tensor),
    )


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; torch has no public name for it."""
    return 0 if tensor.is_inference() else int(tensor._version)  # noqa: SLF001
