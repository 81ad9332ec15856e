"""Weights: finding those that fit a network in a checkpoint, and loading them strictly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoints import State, read_checkpoint, state_dicts, whole_network
from models.errors import ModelLoadFailed

_NAMED_KEYS = 3
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)")
_TRAINING_ONLY = re.compile(
    r"(^|_)(criterion|loss|metrics?|acc|accuracy|auroc|auc|f1|precision|recall|confusion|confmat"
    r"|ema|augment\w*|mixup)(_|\d|$)|loss$|metrics?$|acc$|^n_averaged$"
)
"""Names of what training scripts keep in a network in addition to its layers."""
_RENAMED = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
"""Names of weight norm before torch 2.0, and since."""


@contextmanager
def seeded() -> Iterator[None]:
    """Make random weights the same in every process; torch's own random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def fill_zero_heads(module: nn.Module) -> None:
    """Give linear layers of zeros small random weights: some libraries start their classifiers so.

    Such a model would score every class 0 for every image, and no layer of it could be explained.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not bool(layer.weight.any()):
            nn.init.normal_(layer.weight, std=0.02)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """The tensors below one prefix of one state dict of a checkpoint.

    Attributes:
        place: where they are, dotted; empty for the whole file.
        state: the tensors by name, without the prefix.
        foreign: top-level names of what does not have the prefix.
        unwrapped: parts of names that wrappers put in, and that were taken out.
        folded: whether weight normalisation was taken out of them.
        averaged: whether they are averages over training.
        matched: how many have a name and shape of the network's.
    """

    place: str
    state: State
    foreign: tuple[str, ...]
    unwrapped: tuple[str, ...]
    folded: bool
    averaged: bool
    matched: int


def load_weights(
    module: nn.Module,
    weights: str,
    *,
    base_dir: Path,
    key: str | None = None,
    ignored: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Load the part of a checkpoint that holds every parameter and buffer of a model.

    Args:
        module: it gets the weights, and is left as it is where they do not fit.
        weights: path of the file, which may start from `base_dir`.
        key: dotted place of the weights in the file; None takes the place that fits.
        base_dir: folder of the configuration.
        ignored: prefixes of keys that are passed over.

    Returns:
        What was found, as sentences for the model card.

    Raises:
        ModelLoadFailed: the file is missing or unreadable, or holds nothing that fits.
    """
    content = read_checkpoint(weights, base_dir=base_dir)
    expected = module.state_dict()
    parts = list(_parts(content, expected, ignored))
    if not parts:
        raise whole_network(content, weights) or ModelLoadFailed(
            f"The weights file {weights} holds no state dict."
        )
    if key is not None:
        places = list(dict.fromkeys(part.place for part in parts if part.place))
        parts = [part for part in parts if part.place == key or part.place.startswith(f"{key}.")]
        if not parts:
            raise ModelLoadFailed(
                f"The weights file {weights} has nothing under weights_key {key}. "
                f"It has {', '.join(places[:8]) or 'no places within'}."
            )
    # Of those that fit equally well, the plain one that comes first.
    best = min(parts, key=lambda part: (-part.matched, part.averaged, -len(part.state)))
    _check_fit(expected, best.state, weights)
    module.load_state_dict({name: best.state[name] for name in expected if name in best.state})
    return tuple(_notes(best, parts, expected))


def _parts(content: Any, expected: State, ignored: tuple[str, ...]) -> Iterator[_Part]:
    """Every part of a checkpoint that may be meant for a network."""
    tops = {name.split(".")[0] for name in expected}
    for place, state, unwrapped in state_dicts(content):
        for prefix in _prefixes(state, expected):
            inside = {
                _renamed(name.removeprefix(prefix), expected): value
                for name, value in state.items()
                if name.startswith(prefix)
            }
            beside = {name for name in state if not name.startswith(prefix)}
            if not prefix:
                beside = {name for name in inside if _is_training_only(name.split(".")[0], tops)}
            kept = {
                name: value
                for name, value in inside.items()
                if not name.startswith(ignored) and (prefix or name not in beside)
            }
            kept, folded = _folded(kept, expected)
            where = ".".join(filter(None, (place, prefix.removesuffix("."))))
            yield _Part(
                place=where,
                state=kept,
                foreign=tuple(sorted({name.split(".")[0] for name in beside})),
                unwrapped=unwrapped,
                folded=folded,
                averaged="n_averaged" in state or _AVERAGED.search(where) is not None,
                matched=sum(_fits(value, expected.get(name)) for name, value in kept.items()),
            )


def _is_training_only(top: str, tops: set[str]) -> bool:
    return top not in tops and _TRAINING_ONLY.search(top) is not None


def _renamed(name: str, expected: State) -> str:
    """A name as the network has it, if an older torch called it otherwise."""
    stem, _, last = name.rpartition(".")
    newer = f"{stem}.{_RENAMED.get(last, last)}".lstrip(".")
    return newer if newer in expected else name


def _folded(state: State, expected: State) -> tuple[dict[str, Tensor], bool]:
    """The weights without weight normalisation, where the network has none; whether there was any.

    weight = g · v / |v|, the norm taken over the dimensions that g does not have.
    """
    folded = dict(state)
    for name in expected:
        stem = name.removesuffix("weight")
        parametrised = f"{stem}parametrizations.weight.original"
        for size, direction in (
            (f"{name}_g", f"{name}_v"),
            (f"{parametrised}0", f"{parametrised}1"),
        ):
            if name not in state and size in state and direction in state:
                g, v = folded.pop(size).double(), folded.pop(direction).double()
                over = [d for d in range(v.ndim) if g.ndim != v.ndim or g.shape[d] == 1]
                norm = torch.linalg.vector_norm(v, dim=over, keepdim=True)
                folded[name] = (g * v / norm).to(state[direction].dtype)
    return folded, len(folded) < len(state)


def _prefixes(state: State, expected: State) -> list[str]:
    """Prefixes below which names of the network are found, and none, in the order of the file."""
    # The first and the last name tell: each prefix that fits has all of them.
    names = [name for name in expected if not name.endswith("num_batches_tracked")]
    wanted = dict.fromkeys((*names[:1], *names[-1:]))
    found = [
        name.removesuffix(end)
        for name in state
        for end in wanted
        if name == end or name.endswith(f".{end}")
    ]
    return list(dict.fromkeys(found)) or [_common_prefix(state)]


def _common_prefix(state: State) -> str:
    """The wrapper's prefix that every name has, if there is one."""
    return "module." if state and all(name.startswith("module.") for name in state) else ""


def _fits(value: Tensor, wanted: Tensor | None) -> bool:
    return wanted is not None and value.shape == wanted.shape


def _notes(best: _Part, parts: list[_Part], expected: State) -> Iterator[str]:
    if best.place:
        averages = ", averages over training" if best.averaged else ""
        yield f"The weights are those under {best.place} in the file{averages}."
    elif best.averaged:
        yield "The weights are averages over training."
    if best.folded:
        yield "Weight normalisation in the file is folded into the weights."
    if best.unwrapped:
        yield f"Taken out of the names in the file: {', '.join(best.unwrapped)}."
    others = [
        part for part in parts if part is not best and part.place and part.matched == best.matched
    ]
    for part in others:
        what = "averaged weights" if part.averaged else "other weights"
        yield (
            f"The file also holds {what} that fit, under {part.place}: "
            f'set weights_key = "{part.place}" to serve those.'
        )
    elsewhere = {part.place.rpartition(".")[2] for part in others}
    if foreign := [name for name in best.foreign if name not in elsewhere]:
        more = f" and {len(foreign) - _NAMED_KEYS} more" if len(foreign) > _NAMED_KEYS else ""
        yield f"Passed over in the file: {', '.join(foreign[:_NAMED_KEYS])}{more}."
    kinds = {
        str(value.dtype).removeprefix("torch.")
        for name, value in best.state.items()
        if value.is_floating_point() and value.dtype != expected[name].dtype
    }
    if kinds:
        yield f"The weights were stored as {', '.join(sorted(kinds))}; they are used as float32."


def _check_fit(expected: State, state: State, weights: str) -> None:
    # Counters of batches that older checkpoints lack; nothing but training reads them.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    if reason := _other_kind(state, expected):
        raise ModelLoadFailed(f"The weights file {weights} {reason}")
    shapes = {
        key: (state[key].shape, expected[key].shape)
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    }
    reshaped = [
        f"{key} ({_shape(found)} instead of {_shape(wanted)})"
        for key, (found, wanted) in shapes.items()
    ]
    problems = [
        f"{kind}: {', '.join(keys[:_NAMED_KEYS])}"
        + (f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else "")
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
        )
        if keys
    ]
    if problems:
        hint = ""
        if reshaped and not (missing or unexpected):
            # Only the classes of the last layer: everything else of it has its size.
            heads = all(found[1:] == wanted[1:] for found, wanted in shapes.values())
            hint = (
                " Is num_classes right?"
                if heads
                else " Was it trained at another input size, or in another variant?"
            )
        raise ModelLoadFailed(
            f"The weights file {weights} does not fit the model: {'; '.join(problems)}.{hint}"
        )


def _other_kind(state: State, expected: Mapping[str, Tensor]) -> str | None:
    """Why tensors are not plain weights of the network; None if they are."""
    if any(".lora_" in key for key in state):
        return (
            "holds LoRA adapters that are not merged. Merge them and save again, in PEFT: "
            'torch.save(model.merge_and_unload().state_dict(), "merged.pth").'
        )
    for key, value in state.items():
        wanted = expected.get(key)
        whole = not value.is_floating_point() or value.is_quantized
        if wanted is not None and wanted.is_floating_point() and whole:
            return (
                f"holds quantised weights ({key} is {str(value.dtype).removeprefix('torch.')}). "
                "Save the network's weights before they are quantised."
            )
    return None


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"
