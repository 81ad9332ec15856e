"""Adapters of PEFT: LoRA's low-rank changes, added to the weights of their network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoints import read_checkpoint
from models.errors import ModelLoadFailed

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPERS = ("base_layer", "modules_to_save")
"""Parts of names that PEFT puts in."""
_OTHERWISE = (
    "Merge it into its network and save that: model.merge_and_unload().save_pretrained(folder)."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """What PEFT's `save_pretrained` wrote.

    Attributes:
        name: of its folder, for errors.
        config: its adapter_config.json.
        tensors: by the names that the network has for its layers.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, folder: Path, name: str) -> Adapter | None:
        """Read the adapter in a folder; None if it holds none.

        Raises:
            ModelLoadFailed: it cannot be read, or is not LoRA.
        """
        if not (folder / _CONFIG).is_file():
            return None
        try:
            config = json.loads((folder / _CONFIG).read_text())
        except (OSError, ValueError) as error:
            raise ModelLoadFailed(f"{name}/{_CONFIG} cannot be read.") from error
        kind = config.get("peft_type")
        if kind != "LORA" or config.get("use_dora"):
            kind = "DoRA" if kind == "LORA" else kind
            raise ModelLoadFailed(f"{name} holds a PEFT adapter of type {kind}. {_OTHERWISE}")
        file = next((file for file in _FILES if (folder / file).is_file()), _FILES[0])
        tensors = read_checkpoint(file, base_dir=folder)
        return cls(name=name, config=config, tensors={_plain(k): v for k, v in tensors.items()})

    def network_in(self, folder: Path, base_dir: Path) -> Path:
        """The folder of the network that it changes: its own, or the one that it names.

        Raises:
            ModelLoadFailed: there is no such folder.
        """
        named = str(self.config.get("base_model_name_or_path") or "")
        for place in (folder, folder / named, base_dir / named):
            if (place / "config.json").is_file():
                return place
        raise ModelLoadFailed(
            f"{self.name} holds an adapter without its network, {named or 'which it does not name'}"
            ". Nothing is fetched: save the network to the same folder with save_pretrained."
        )

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Add s B A to each weight that it changes, and replace what it holds as a whole.

        Raises:
            ModelLoadFailed: it is not of this network, or more than LoRA.
        """
        state = module.state_dict()
        for name, tensor in self.tensors.items():
            layer, _, part = name.partition(".lora_")
            if part == "B.weight" and f"{layer}.lora_A.weight" in self.tensors:
                continue
            changed = f"{layer}.weight" if part else name
            high = self.tensors.get(f"{layer}.lora_B.weight")
            if changed not in state or (part and (part != "A.weight" or high is None)):
                raise ModelLoadFailed(
                    f"The adapter in {self.name} holds {name}, which is not a layer of the network, "
                    f"or more than LoRA. {_OTHERWISE}"
                )
            weight = state[changed]
            made = tensor if high is None else self._product(layer, high, tensor)
            if weight.numel() != made.numel() or (high is None and weight.shape != made.shape):
                raise ModelLoadFailed(
                    f"The adapter in {self.name} was made for another network, or for one with other "
                    f"classes: {changed} has {made.numel()} values, the network's "
                    f"{weight.numel()}. Is num_classes right?"
                )
            weight.copy_(made if high is None else weight + made.view_as(weight))

    def _product(self, layer: str, high: Tensor, low: Tensor) -> Tensor:
        """What is added to a weight: of a linear layer, or of a convolution, whose B is 1 x 1."""
        alpha, rank = self.config.get("lora_alpha", 8), len(low)
        for pattern, own in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = own
                break
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        made: Tensor = scale * high.float().flatten(1) @ low.float().flatten(1)
        return made.T.contiguous() if self.config.get("fan_in_fan_out") else made


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """The folder as it is without an adapter in it, which transformers would put into the network."""
    if not (folder / _CONFIG).is_file():
        yield folder
        return
    with TemporaryDirectory() as made:
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(made) / file.name).symlink_to(file.resolve())
        yield Path(made)


def _plain(name: str) -> str:
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)
