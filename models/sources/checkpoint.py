"""`checkpoint:FILE`: weights alone, whose architecture is found in timm or torchvision.

It is the one that a training script noted in the file (`arch`), or that the file is called by
(`resnet50-0676ba61.pth`), or the one of torchvision's whose weights have the same names and shapes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision.models as zoo
from torch import nn

from models.checkpoints import State, read_checkpoint, state_dicts
from models.errors import ModelLoadFailed
from models.sources import SOURCES, BuildRequest, Built
from models.sources.torchvision import AUXILIARY
from models.weights import load_weights

_NOTED = ("arch", "architecture", "model_name")
"""Where training scripts note the architecture in a checkpoint."""

Shapes = dict[str, torch.Size]


def build(request: BuildRequest) -> Built:
    """Find out the architecture, build it, and load the weights.

    Raises:
        ModelLoadFailed: the file cannot be read, or its weights fit no architecture that it tells.
    """
    content = read_checkpoint(request.name, base_dir=request.base_dir)
    library, name, reason, outputs = _identified(content, request.name)
    known = replace(
        request, name=name, pretrained=False, num_classes=request.num_classes or outputs or None
    )
    built: Built = importlib.import_module(SOURCES[library]).build(known)
    found = load_weights(
        built.module, request.name, base_dir=request.base_dir, ignored=built.ignored_keys
    )
    note = (
        f"{request.name} holds weights alone. They are served as {library}:{name}, because "
        f"{reason}, with the preprocessing of its default weights."
    )
    return replace(built, notes=(note, *built.notes, *found))


def _identified(content: Any, file: str) -> tuple[str, str, str, int]:
    """Library, architecture, reason, and the number of scores, 0 if it is the usual one."""
    states = [_shapes(state) for _, state, _ in state_dicts(content)]
    for library, name, reason in _candidates(content, file):
        outputs = _outputs(_networks(library), name, states)
        if outputs is not None:
            return library, name, reason, outputs
    raise ModelLoadFailed(
        f"{file} holds weights, but does not say of which network: neither its content nor its "
        "name tells, and no architecture of torchvision has such layers. Configure source (such "
        f'as "timm:resnet50") and weights = "{file}".'
    )


def _candidates(content: Any, file: str) -> Iterator[tuple[str, str, str]]:
    """Library, architecture and reason, the likeliest first."""
    noted = content if isinstance(content, Mapping) else {}
    stem = Path(file).stem
    names = {
        **{
            noted[key]: "the checkpoint says so"
            for key in _NOTED
            if isinstance(noted.get(key), str)
        },
        **dict.fromkeys((stem, stem.split("-")[0], stem.split(".")[0]), "its file is called so"),
    }
    # Those with heads for training alone have other layers here than in their checkpoints.
    in_torchvision = [name for name in zoo.list_models(module=zoo) if name not in AUXILIARY]
    for name, reason in names.items():
        if name in in_torchvision:
            yield "torchvision", name, reason
        if timm.is_model(name.split(".")[0]):
            yield "timm", name, reason
    for name in in_torchvision:
        yield "torchvision", name, "its layers have these names and shapes"


def _networks(library: str) -> Callable[[str], nn.Module]:
    return timm.create_model if library == "timm" else zoo.get_model


def _outputs(create: Callable[[str], nn.Module], name: str, states: list[Shapes]) -> int | None:
    """Scores of an image by weights of this architecture, 0 as usual; None if none are its own."""
    # Nothing is allocated there; the few networks that compute while they are built, are not tried.
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        expected = _shapes(create(name).state_dict())
        for state in states:
            if state.keys() != expected.keys():
                continue
            others = [key for key in expected if state[key] != expected[key]]
            sizes = {state[key][0] for key in others if state[key][1:] == expected[key][1:]}
            if not others:
                return 0
            if len(sizes) == 1 and all(state[key][1:] == expected[key][1:] for key in others):
                return sizes.pop()
    return None


def _shapes(state: State) -> Shapes:
    """Shapes by name, without what all names begin with and without counters of batches."""
    shapes = {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}
    while shapes and len({key.partition(".")[0] for key in shapes}) == 1:
        shapes = {key.partition(".")[2]: shape for key, shape in shapes.items()}
    return shapes
