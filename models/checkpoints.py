"""Checkpoint files: reading them without running what they hold, and the state dicts in them."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import ModelLoadFailed

State = Mapping[str, Tensor]

_SHARD_INDEX = ".index.json"
_LARGEST_DEPTH = 4
_LONGEST_LIST = 8
_WRAPPING_PARTS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Parts of names that torch.compile, FSDP and activation checkpointing put in."""
_NEEDS_CODE = ("GLOBAL", "Can only", "Trying to")
_SOURCES = {".pt2": "export", ".onnx": "onnx"}
"""Sources of networks in files that are no checkpoints, by suffix."""
_OTHER_FILES = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run git lfs pull.",
    b"<!doctype": "is a web page: the download went wrong.",
    b"<html": "is a web page: the download went wrong.",
    b"\x89hdf": "is an HDF5 file, as Keras writes it: save the weights from torch.",
}
_SCRIPT = """
  import torch
  content = torch.load("{file}", map_location="cpu", weights_only=False)
  torch.save(content{place}.state_dict(), "state_dict.pth")
"""
_NUMPY = "_reconstruct"
"""The function by which NumPy's arrays are unpickled."""
_NUMPY_SCRIPT = """
  import torch
  content = torch.load("{file}", map_location="cpu", weights_only=False)
  torch.save({name: torch.as_tensor(array) for name, array in content.items()}, "tensors.pth")"""


class Unread:
    """Stands in for an object in a checkpoint whose class is not imported."""

    def __new__(cls, *_: object, **__: object) -> Unread:
        """Take any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Keep attributes, to tell a network by them."""
        if isinstance(state, dict):
            vars(self).update(state)

    @property
    def is_network(self) -> bool:
        """Whether the object has the state of a `torch.nn.Module`."""
        return "_parameters" in vars(self)


def check_digest(weights: str, expected: str, *, base_dir: Path) -> None:
    """Check that a weights file is the one that the operator means.

    Raises:
        ModelLoadFailed: it is another one, or does not exist, or its parts are files of their own.
    """
    path = base_dir / weights
    if path.name.endswith(_SHARD_INDEX):
        raise ModelLoadFailed(
            "weights_sha256 is the digest of one file, but these weights are in several."
        )
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadFailed(f"The weights file {weights} cannot be read.") from error
    if found != expected:
        raise ModelLoadFailed(f"The weights file {weights} does not have the given weights_sha256.")


def read_checkpoint(weights: str, *, base_dir: Path) -> Any:
    """Read a file of torch or safetensors, or the index of one in shards, on the CPU.

    Tensors of large files are not read before they are used. Objects of unknown classes, such as
    the arguments of a training script, are replaced by `Unread`: no code of the file is run.

    Raises:
        ModelLoadFailed: the file does not exist, or is not a checkpoint that can be read so.
    """
    path = base_dir / weights
    if path.is_dir():
        raise ModelLoadFailed(f"The weights {weights} are a folder. {_files_of(path)}")
    if not path.is_file():
        missing = FileNotFoundError(str(path.resolve()))
        raise ModelLoadFailed(
            f"The weights file {weights} does not exist. Weights are the path of a checkpoint, "
            "`default` (those of the library) or `none` (random)."
        ) from missing
    try:
        if path.name.endswith(_SHARD_INDEX):
            return _read_shards(path)
        return _read(path)
    except ModelLoadFailed:
        raise
    except Exception as error:
        raise ModelLoadFailed(f"The weights file {weights} {_fault(error, path)}") from error


def state_dicts(content: Any) -> Iterator[tuple[str, State, tuple[str, ...]]]:
    """Every mapping in a checkpoint that holds tensors by name, with its dotted place in it.

    Parts of names that wrappers put in are taken out, and come last.
    """
    pending: list[tuple[str, Any, int]] = [("", content, 0)]
    while pending:
        place, value, depth = pending.pop(0)
        if depth > _LARGEST_DEPTH:
            continue
        if isinstance(value, (list, tuple)):
            items = enumerate(value[:_LONGEST_LIST])
            value = {str(i): item for i, item in items if isinstance(item, Mapping)}
        if not isinstance(value, Mapping):
            continue
        tensors = {
            _plain_name(key): tensor if tensor.layout is torch.strided else tensor.to_dense()
            for key, tensor in value.items()
            if isinstance(key, str) and isinstance(tensor, Tensor)
        }
        if tensors:
            found = {part for key in value for part in str(key).split(".")}
            yield place, tensors, tuple(sorted(found & _WRAPPING_PARTS))
        # Optimisers number what they hold.
        inner = {key: item for key, item in value.items() if isinstance(key, str)}
        pending += [(f"{place}.{key}".lstrip("."), item, depth + 1) for key, item in inner.items()]


def whole_network(content: Any, weights: str) -> ModelLoadFailed | None:
    """The refusal of a pickled network, if a checkpoint holds one, with the way out."""
    inside = content.items() if isinstance(content, Mapping) else ()
    if any(type(value).__name__ == _NUMPY for _, value in inside):
        return ModelLoadFailed(
            f"The weights file {weights} holds arrays of NumPy in place of tensors, which are not "
            f"read. Save them as tensors, and configure that file:{_NUMPY_SCRIPT}".replace(
                "{file}", Path(weights).name
            )
        )
    places = [("", content), *((f"[{key!r}]", value) for key, value in inside)]
    for place, value in places:
        if isinstance(value, Unread) and value.is_network:
            return ModelLoadFailed(
                f"The weights file {weights} holds a whole pickled network{place and ' under '}"
                f"{place}, which would run code of its own. Where that code is installed, save its "
                f"state_dict(), and configure that file:{_script(weights, place)}"
            )
    return None


def _script(weights: str, place: str = "") -> str:
    return _SCRIPT.format(file=Path(weights).name, place=place).rstrip()


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # Files of torch before 1.6 do not say what they hold.
    except Exception:  # noqa: BLE001
        return torch.load(path, map_location="cpu", weights_only=True)
    # A class of its own for each name: torch tells them apart by it.
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (type(name.rpartition(".")[2], (Unread,), {}), name) for name in unknown
    ]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of the files that an index of transformers' `save_pretrained` names."""
    names = json.loads(index.read_text())["weight_map"]
    state: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        # The index may come from elsewhere: it names files beside it, nothing else.
        shard = index.parent / Path(name).name
        if not shard.is_file():
            missing = FileNotFoundError(str(shard.resolve()))
            raise ModelLoadFailed(f"{index.name} names {name}, which is not there.") from missing
        state |= _read(shard)
    return state


def _files_of(folder: Path) -> str:
    """What to name instead of a folder."""
    if any(folder.glob("*.distcp")):
        return (
            "It is a sharded checkpoint of torch.distributed; make one file of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder.name} "
            "weights.pth"
        )
    files = sorted(
        file.name
        for pattern in ("*.safetensors", f"*{_SHARD_INDEX}", "*.pth", "*.pt", "*.ckpt", "*.bin")
        for file in folder.glob(pattern)
    )
    return f"Name a file in it: {', '.join(files[:3])}." if files else "It holds no checkpoint."


def _fault(error: Exception, path: Path) -> str:
    """What is wrong with a file, by what torch said of it."""
    if "TorchScript" in str(error):
        return "is a TorchScript archive: save the state_dict() of the network that it was made of."
    # Torch says what it does not load, and so tells a pickle that needs code from a damaged file.
    if isinstance(error, pickle.UnpicklingError) and any(
        sign in str(error) for sign in _NEEDS_CODE
    ):
        return (
            "holds more than tensors and plain values, which would run code of its own. Where that "
            f"code is installed, save its state_dict(), and configure that file:{_script(path.name)}"
        )
    if source := _SOURCES.get(path.suffix):
        return f'is a whole network without code: set source = "{source}:{path.name}" instead.'
    with path.open("rb") as file:
        begins = file.read(64).lstrip().lower()
    for sign, sentence in _OTHER_FILES.items():
        if begins.startswith(sign):
            return sentence
    return "cannot be read: it is damaged, or no checkpoint of torch or safetensors."


def _plain_name(key: str) -> str:
    parts = key.split(".")
    if _WRAPPING_PARTS.isdisjoint(parts):
        return key
    return ".".join(part for part in parts if part not in _WRAPPING_PARTS)
