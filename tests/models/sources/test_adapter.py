"""Adapters of LoRA: the merged network answers as it does with the adapter beside its layers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import ModelLoadFailed
from models.sources import load
from tests.models.sources.test_transformers import PROCESSORS, convnext, saved, vit

RANK = 2


class Low(nn.Module):
    """A and B beside a layer, as PEFT runs them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            shape = (layer.kernel_size, layer.stride, layer.padding)
            self.a = nn.Conv2d(layer.in_channels, RANK, *shape, bias=False)
            self.b = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
        else:
            self.a = nn.Linear(layer.in_features, RANK, bias=False)
            self.b = nn.Linear(RANK, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def write(folder, tensors: dict[str, Tensor], **config) -> None:
    """An adapter as PEFT saves it."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")


def adapted(network: nn.Module, layers: list[str], scale: float) -> dict[str, Tensor]:
    """Put LoRA beside some layers of a network; returns the adapter's tensors."""
    tensors = {}
    for name in layers:
        layer = network.get_submodule(name)
        low = Low(layer)
        layer.register_forward_hook(lambda _, x, y, low=low: y + scale * low(x[0]))
        tensors[f"{name}.lora_A.weight"] = low.a.weight.detach().contiguous()
        tensors[f"{name}.lora_B.weight"] = low.b.weight.detach().contiguous()
    return tensors


def linears(network: nn.Module) -> list[str]:
    found = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    return found[:2]


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 6 / RANK),
        ({"use_rslora": True}, 6 / math.sqrt(RANK)),
        ({"alpha_pattern": {r"layers?\..*": 3, "dense": 5}, "lora_alpha": 99}, 3 / RANK),
    ],
)
def test_a_merged_network_answers_as_with_the_adapter_beside_it(tmp_path, spec_of, config, scale):
    network = vit().eval()
    saved(tmp_path / "saved", network, PROCESSORS["squash"])
    write(tmp_path / "saved", adapted(network, linears(network), scale), **config)
    loaded = load(spec_of("transformers:saved", weights="default"), tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.module(images), network(images).logits, atol=1e-5, rtol=1e-4)
    assert "The adapter in saved is merged" in loaded.notes[0]


def test_convolutions_are_merged(tmp_path, spec_of):
    network = convnext().eval()
    saved(tmp_path / "saved", network, PROCESSORS["squash"])
    layers = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.groups == 1
    ]
    write(tmp_path / "saved", adapted(network, layers[:2], 6 / RANK))
    loaded = load(spec_of("transformers:saved", weights="default"), tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.module(images), network(images).logits, atol=1e-5, rtol=1e-4)


def test_an_adapter_names_its_network_and_brings_its_classifier(tmp_path, spec_of):
    network = vit(id2label=dict(enumerate("abcde"))).eval()
    saved(tmp_path / "base", network, PROCESSORS["squash"])
    network.classifier = nn.Linear(32, 3)
    head = {
        "classifier.weight": network.classifier.weight.detach(),
        "classifier.modules_to_save.bias": network.classifier.bias.detach(),
    }
    tensors = adapted(network, linears(network), 3.0) | head
    write(tmp_path / "adapter", tensors, base_model_name_or_path="base")
    with pytest.raises(ModelLoadFailed, match="Is num_classes right"):
        load(spec_of("transformers:adapter", weights="default"), tmp_path)
    spec = spec_of("transformers:adapter", weights="default", num_classes=3)
    loaded = load(spec, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.module(images), network(images).logits, atol=1e-5, rtol=1e-4)
    assert loaded.labels == ("class 0", "class 1", "class 2")
    assert loaded.preprocess.crop == (32, 32)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"peft_type": "LOHA"}, "of type LOHA"),
        ({}, {"use_dora": True}, "of type DoRA"),
        ({"nowhere.lora_A.weight": torch.ones(2, 4)}, {}, "not a layer of the network"),
        ({"classifier.lora_A.weight": torch.ones(2, 32)}, {}, "or more than LoRA"),
        ({"classifier.lora_B.weight": torch.ones(5, 2)}, {}, "or more than LoRA"),
        ({"classifier.lora_magnitude_vector": torch.ones(5)}, {}, "or more than LoRA"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, spec_of, tensors, config, message):
    saved(tmp_path / "saved", vit(), PROCESSORS["squash"])
    write(tmp_path / "saved", tensors or {"x": torch.ones(1)}, **config)
    with pytest.raises(ModelLoadFailed, match=f"{message}.*merge_and_unload"):
        load(spec_of("transformers:saved", weights="default"), tmp_path)


def test_an_adapter_without_its_network_is_refused(tmp_path, spec_of):
    write(tmp_path / "saved", {"x": torch.ones(1)}, base_model_name_or_path="google/vit")
    with pytest.raises(ModelLoadFailed, match=r"without its network, google/vit.*same folder"):
        load(spec_of("transformers:saved", weights="default"), tmp_path)
