"""From what a network returns to scores: how they lie in it, and what a network is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointFunction

from models.errors import ModelLoadFailed

Ending = Literal["softmax", "log_softmax", "sigmoid"]

_SCORE_NAMES = ("logits", "out")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the scores lie in what a network returns.

    Attributes:
        key: index, key or attribute of the scores, of nested answers joined by dots; None where they
            are what is returned.
        flat: whether one score per image comes without a dimension of its own.
        pooled: whether the scores of an image are a map of one pixel, (N, outputs, 1, 1).
        in_place: whether the network works on its input in place, and so is given a copy.
        contiguous: whether the network takes images in contiguous memory only.
        lone: whether an image alone gets its scores without the dimension of the batch.
        twice: whether an image alone is given twice, since the network fails on a batch of one.
        single: whether images are given one after another, since it fails on other batches.
        straight: whether what it checkpoints is run without that.
        undo: what made probabilities of the scores, outside of any module.
    """

    key: int | str | None = None
    flat: bool = False
    pooled: bool = False
    in_place: bool = False
    contiguous: bool = False
    lone: bool = False
    twice: bool = False
    single: bool = False
    straight: bool = False
    undo: Ending | None = None

    def scores(self, answer: Any) -> Tensor:
        """The scores, (N, outputs)."""
        found: Any = answer if self.key is None else _part(answer, self.key)
        if self.flat:
            found = found.reshape(-1, 1)
        if self.pooled:
            found = found.flatten(1)
        if self.lone and found.ndim == 1:
            found = found[None]
        if self.undo is not None:
            found = _UNDO[self.undo](found.float())
        scores: Tensor = found
        return scores

    def notes(self) -> list[str]:
        """What was adapted, as sentences."""
        notes = []
        if self.key is not None:
            name = f"element {self.key}" if isinstance(self.key, int) else f"`{self.key}`"
            notes.append(f"The scores are {name} of what the network returns.")
        if self.in_place:
            notes.append("The network works on its input in place, and is given a copy.")
        if self.contiguous:
            notes.append("The network does not take images channels_last, and is given a copy.")
        if self.twice:
            notes.append("The network fails on one image alone, which is given to it twice.")
        if self.single:
            notes.append("The network fails on batches, and is given one image after another.")
        if self.straight:
            notes.append("Gradient checkpointing (use_reentrant=True) is switched off.")
        return notes


def find_scores(answer: Any, output: int | str | None = None) -> tuple[int | str | None, Tensor]:
    """The one tensor of scores in what a network returned, and its key.

    `output` names it where several tensors are returned: a key, attribute or index.

    Raises:
        ModelLoadFailed: there is none, or it is not clear which one it is.
    """
    if output is not None:
        return output, _named_output(answer, output)
    if isinstance(answer, Tensor):
        return None, answer
    if isinstance(answer, Mapping):
        tensors = {str(k): v for k, v in answer.items() if isinstance(v, Tensor)}
    else:
        tensors = {
            name: value
            for name in _SCORE_NAMES
            if isinstance(value := getattr(answer, name, None), Tensor)
        }
    named = [name for name in _SCORE_NAMES if name in tensors] or list(tensors)
    if len(named) == 1:
        return named[0], tensors[named[0]]
    if isinstance(answer, Sequence) and len(answer) == 1 and isinstance(answer[0], Tensor):
        return 0, answer[0]
    raise ModelLoadFailed(
        f"The model returns {describe(answer)}, not one tensor of scores. {_way_to_say(answer)}"
    )


def _part(answer: Any, key: int | str) -> Any:
    """What a key, attribute or index names in an answer; names of nested ones are joined by dots.

    Raises:
        LookupError, AttributeError, ValueError, TypeError: nothing.
    """
    if isinstance(key, int):
        return answer[key]
    if isinstance(answer, Mapping) and key in answer:
        return answer[key]
    found = answer
    for name in key.split("."):
        if isinstance(found, Mapping):
            found = found[name if name in found else int(name)]
        elif name.isdigit():
            found = found[int(name)]
        else:
            found = getattr(found, name)
    return found


def _named_output(answer: Any, output: int | str) -> Tensor:
    found = None
    with suppress(LookupError, AttributeError, ValueError, TypeError):
        found = _part(answer, output)
    if not isinstance(found, Tensor):
        raise ModelLoadFailed(
            f"output = {json.dumps(output)} does not name a tensor in what the model returns, which is "
            f"{describe(answer)}. {_way_to_say(answer)}"
        )
    return found


def _way_to_say(answer: Any) -> str:
    """How the configuration names one of several outputs, as a sentence."""
    for path, _ in _tensors(answer):
        name = path if path.isdigit() else f'"{path}"'
        kind = "attribute" if hasattr(answer, path) else "key"
        return (
            f"Say which one the scores are: output = {name}, or another "
            f"{'index' if path.isdigit() else kind}."
        )
    return "Let its forward return one."


def _tensors(answer: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in an answer, by the name that `output` has for them."""
    if isinstance(answer, Mapping):
        items = [(str(key), value) for key, value in answer.items()]
    elif isinstance(answer, Sequence):
        items = [(str(index), value) for index, value in enumerate(answer)]
    else:
        items = list(getattr(answer, "__dict__", {}).items())
    for name, value in items:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _tensors(value))


def describe(answer: Any) -> str:
    """What a network returned, in words."""
    if isinstance(answer, Tensor):
        return f"a tensor of {' x '.join(map(str, answer.shape)) or 'no dimension'}"
    if isinstance(answer, Mapping):
        return f"a dictionary with the keys {', '.join(map(str, answer))}"
    if isinstance(answer, (tuple, list)):
        kind = type(answer).__name__
        parts = ", ".join(describe(part) for part in answer[:4])
        return f"a {kind} of {len(answer)} ({parts}{', …' if len(answer) > 4 else ''})"
    return f"an object of type {type(answer).__name__}"


def adapt(module: nn.Module, reading: Reading) -> nn.Module:
    """Make a network return its scores, under the names that its layers have.

    The network itself is changed, to a subclass of its own: a wrapper around it would change the
    names of all layers.

    Raises:
        ModelLoadFailed: it is compiled, so that its forward cannot be extended.
    """
    if reading == Reading():
        return module
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)) or "forward" in vars(module):
        raise ModelLoadFailed(
            "The network does not return plain scores, and its forward is compiled or replaced, "
            f"so that it cannot be adapted: {' '.join(reading.notes()) or 'it returns one value.'}"
        )
    kind = type(module)

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        given = images.contiguous() if reading.contiguous else images
        given = given.clone() if reading.in_place else given
        if reading.straight:
            with run_straight():
                return reading.scores(kind.forward(self, given))
        return reading.scores(kind.forward(self, given))

    def forward_sized(self: nn.Module, images: Tensor) -> Tensor:
        if reading.single and len(images) > 1:
            return torch.cat([forward(self, image) for image in images.split(1)])
        if reading.twice and len(images) == 1:
            return forward(self, images.repeat(2, 1, 1, 1))[:1]
        return forward(self, images)

    body: dict[str, Any] = {"forward": forward}
    if reading.twice or reading.single:
        body = {"forward": forward_sized, "largest_batch": 1 if reading.single else None}
        body["least_batch"] = 2 if reading.twice else 1
    module.__class__ = type(kind.__name__, (kind,), body)
    return module


@contextmanager
def run_straight() -> Iterator[list[str]]:
    """Run what is checkpointed as it is: there is nothing to save in a pass that trains nothing.

    Reentrant checkpointing gives no gradients of single tensors.

    Yields:
        The names of what was checkpointed in the pass, as they are met.
    """
    met: list[str] = []

    def straight(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        met.append(getattr(function, "__name__", type(function).__name__))
        return function(*args)

    checkpointed = CheckpointFunction.apply
    CheckpointFunction.apply = straight  # type: ignore[method-assign]
    try:
        yield met
    finally:
        CheckpointFunction.apply = checkpointed  # type: ignore[method-assign]


def _logarithms(probabilities: Tensor) -> Tensor:
    """Logarithms, finite for probabilities of 0."""
    return probabilities.clamp_min(_LEAST).log()


def _log_odds(probabilities: Tensor) -> Tensor:
    """Log-odds, finite for probabilities of 0 and 1."""
    return _logarithms(probabilities) - (1 - probabilities).clamp_min(_LEAST_BELOW_ONE).log()


_LEAST = torch.finfo(torch.float32).tiny
_LEAST_BELOW_ONE = torch.finfo(torch.float32).eps / 4
_UNDO: dict[Ending, Callable[[Tensor], Tensor]] = {"softmax": _logarithms, "sigmoid": _log_odds}
