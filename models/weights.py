"""Checkpoints: reading them without running what they hold, and loading them strictly."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelLoadFailed

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_NAMED_KEYS = 3


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Make random weights the same in every process; torch's own random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def fill_zero_heads(module: nn.Module) -> None:
    """Give linear layers of zeros small random weights: some libraries start their classifiers so.

    Such a model would score every class 0 for every image, and no layer of it could be explained.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not bool(layer.weight.any()):
            nn.init.normal_(layer.weight, std=0.02)


def load_weights(
    module: nn.Module, weights: str, *, base_dir: Path, ignored: tuple[str, ...] = ()
) -> None:
    """Load a checkpoint that holds every parameter and buffer of a model, and nothing else.

    `weights` is the path of a `.safetensors`, `.pth` or `.pt` file, which may start from
    `base_dir`; keys with `ignored` prefixes are passed over.

    Raises:
        ModelLoadFailed: the file is missing or unreadable, or its keys do not fit.
    """
    state = {
        key: value
        for key, value in read_state_dict(weights, base_dir=base_dir).items()
        if not key.startswith(ignored)
    }
    _check_fit(module.state_dict(), state, weights)
    module.load_state_dict(state)


def read_state_dict(weights: str, *, base_dir: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, on the CPU.

    `.pth` and `.pt` files are read with `weights_only=True`. They hold a state dict, or one under
    `state_dict`, `model_state_dict` or `model`; prefixes of DataParallel and torch.compile go.

    Raises:
        ModelLoadFailed: the file does not exist, or is not a readable checkpoint of tensors alone.
    """
    path = base_dir / weights
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ModelLoadFailed(
            f"The weights {weights} are neither `default` nor `none`, "
            "nor a .safetensors, .pth or .pt file."
        )
    if not path.is_file():
        missing = FileNotFoundError(str(path.resolve()))
        raise ModelLoadFailed(f"The weights file {weights} does not exist.") from missing
    try:
        content = _read(path)
    except Exception as error:
        raise ModelLoadFailed(f"The weights file {weights} {_fault(error)}.") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise ModelLoadFailed(f"The weights file {weights} holds no state dict.")
    return _without_prefixes(dict(content))


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _fault(error: Exception) -> str:
    """What is wrong with a file, by what torch said of it."""
    if "TorchScript" in str(error):
        return "is a TorchScript archive: save the state_dict() of the network that it was made of"
    # Torch names what it does not load, and so tells a whole pickled network from a damaged file.
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return (
            "holds more than tensors, such as a whole pickled network, which would run code of "
            "its own: save the model's state_dict()"
        )
    return "cannot be read: it is damaged, or no checkpoint of torch or safetensors"


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(len(_PREFIXES)):
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], weights: str) -> None:
    # Counters of batches that older checkpoints lack; nothing but training reads them.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
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


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"
