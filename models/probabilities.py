"""Makes networks that return probabilities return scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from models.errors import ModelLoadFailed
from models.hooks import ForwardHook, HookStack
from models.outputs import Ending, Reading, adapt
from models.types import Task

TOLERANCE = 1e-4
_MODULES: dict[type[nn.Module], Ending] = {
    nn.Softmax: "softmax",
    nn.LogSoftmax: "log_softmax",
    nn.Sigmoid: "sigmoid",
}
_NODES: dict[str, Ending] = {
    "SoftmaxBackward0": "softmax",
    "LogSoftmaxBackward0": "log_softmax",
    "SigmoidBackward0": "sigmoid",
}
_IDLE_NODES = (
    *("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Clone", "Alias", "ToCopy"),
    *("Slice", "Select", "Transpose", "Permute", "TBackward"),
)
_JOINING_NODES = ("Cat", "Stack")


def undo_probabilities(
    module: nn.Module, images: Tensor, scores: Tensor, *, task: Task
) -> tuple[nn.Module, list[str]]:
    """Find out whether a network returns probabilities, and make it return scores.

    A softmax or sigmoid that is a module at the end is left out; otherwise the logarithm, or the
    log-odds, of the probabilities is taken.

    Returns:
        The network, and what was done as sentences.

    Raises:
        ModelLoadFailed: the task does not read such probabilities.
    """
    if not bool(((scores >= 0) & (scores <= 1)).all() or (scores <= 0).all()):
        return module, []
    ending, layer = _ending(module, images[:2])
    if ending is None and _are_distributions(scores):
        ending = "softmax"
    if ending is None:
        return module, []
    _check_task(ending, scores, task)
    if layer and _leave_out(module, layer, (ending, images, scores)):
        return module, [
            f"The network's own {ending} at its end, {layer}, is left out: "
            "the scores are what it is given."
        ]
    if ending == "log_softmax":
        return module, ["The network returns logarithms of probabilities as its scores."]
    what = "logarithms" if ending == "softmax" else "log-odds"
    module = adapt(module, Reading(undo=ending))
    return module, [f"The network returns probabilities ({ending}); the scores are their {what}."]


def _ending(module: nn.Module, images: Tensor) -> tuple[Ending | None, str]:
    """The operation that made the scores, and the name of its module, if one made them."""
    last: list[tuple[Ending, str, Tensor]] = []

    def note(ending: Ending, name: str) -> ForwardHook:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                last.append((ending, name, output))

        return hook

    with torch.enable_grad(), HookStack() as hooks:
        for name, child in module.named_modules():
            ending = _MODULES.get(type(child))
            if ending is not None:
                hooks.forward(child, note(ending, name))
        scores: Tensor = module(images.clone().requires_grad_().clone())
    for ending, name, output in reversed(last):
        if output.numel() == scores.numel() and torch.equal(output.flatten(), scores.flatten()):
            return ending, name
    return _by_graph(scores.grad_fn), ""


def _by_graph(node: Node | None) -> Ending | None:
    """The operation that made the scores, by the recorded graph; one of several heads alike."""
    chosen = False
    while node is not None and node.name().startswith(_IDLE_NODES):
        chosen = chosen or node.name().startswith("Select")
        node = node.next_functions[0][0]
    if node is None:
        return None
    if node.name().startswith(_JOINING_NODES):
        heads = {_by_graph(head) for head, _ in node.next_functions}
        return heads.pop() if len(heads) == 1 else None
    ending = _NODES.get(node.name())
    # One probability of two: its log-odds are the difference of both scores.
    return "sigmoid" if ending == "softmax" and chosen else ending


def _are_distributions(scores: Tensor) -> bool:
    """Whether every row is a distribution over at least two classes."""
    sums = scores.sum(1)
    return (
        scores.shape[1] > 1
        and bool((scores >= 0).all())
        and bool((sums - 1).abs().max() <= TOLERANCE)
    )


def _check_task(ending: Ending, scores: Tensor, task: Task) -> None:
    """Refuse probabilities that the task would read as something else."""
    outputs = scores.shape[1]
    if ending != "sigmoid" and outputs == 1:
        raise ModelLoadFailed(
            f"The network ends in a {ending} over one score, which is the same for every image. "
            "Leave it out of the network."
        )
    if ending != "sigmoid" and task == "multi_label":
        raise ModelLoadFailed(
            f"The network ends in a {ending}: its classes exclude each other. Set task = "
            '"single_label", or leave it out of the network.'
        )
    if ending == "sigmoid" and task not in ("multi_label", "segmentation") and outputs > 1:
        raise ModelLoadFailed(
            "The network ends in a sigmoid: its classes have probabilities of their own. Set "
            'task = "multi_label", or leave it out of the network.'
        )


@torch.no_grad()
def _leave_out(module: nn.Module, layer: str, proof: tuple[Ending, Tensor, Tensor]) -> bool:
    """Replace a layer by nothing, if it then gives the same scores again applied at the end."""
    ending, images, scores = proof
    parent, _, leaf = layer.rpartition(".")
    holder, left_out = module.get_submodule(parent), module.get_submodule(layer)
    setattr(holder, leaf, nn.Identity())
    try:
        found = _APPLY[ending](module(images))
        same = bool((found - scores).abs().max() <= TOLERANCE * scores.abs().max())
    # Whatever the network makes of the change, it is then taken back.
    except Exception:  # noqa: BLE001
        same = False
    if not same:
        setattr(holder, leaf, left_out)
    return same


_APPLY: dict[Ending, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(1),
    "log_softmax": lambda scores: scores.log_softmax(1),
    "sigmoid": torch.sigmoid,
}
