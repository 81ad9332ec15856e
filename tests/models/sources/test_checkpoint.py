"""Weights alone: the architecture is found out, or the file is refused with the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision.models as zoo
from safetensors.torch import save_file
from torch import nn

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed
from models.sources import load


def loaded(folder: Path, file: str, **fields):
    spec = ModelSpec(name="m", source=f"checkpoint:{file}", **fields)
    return load(spec, folder)


def scores(module: nn.Module) -> torch.Tensor:
    image = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        return module.eval()(image)


def test_layers_tell_torchvision_s_architecture(tmp_path: Path) -> None:
    network = zoo.squeezenet1_1(num_classes=4)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    found = loaded(tmp_path, "model.safetensors")
    assert found.num_classes == 4
    assert found.preprocess.crop == (224, 224)
    assert torch.equal(scores(found.module), scores(network))
    assert any("torchvision:squeezenet1_1" in note for note in found.notes)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("resnet10t-0676ba61.pth", lambda state: state),
        ("last.pth", lambda state: {"arch": "resnet10t", "epoch": 3, "state_dict": state}),
        ("resnet10t.pt", lambda state: {f"module.{key}": value for key, value in state.items()}),
    ],
)
def test_the_name_or_a_note_tells_timm_s_architecture(tmp_path: Path, file: str, content) -> None:
    network = timm.create_model("resnet10t", num_classes=5)
    torch.save(content(network.state_dict()), tmp_path / file)
    found = loaded(tmp_path, file, labels=["a", "b", "c", "d", "e"])
    assert found.labels == ("a", "b", "c", "d", "e")
    assert torch.equal(scores(found.module), scores(network))
    assert any("timm:resnet10t" in note for note in found.notes)


def test_a_name_that_lies_is_not_believed(tmp_path: Path) -> None:
    torch.save(zoo.squeezenet1_1(num_classes=4).state_dict(), tmp_path / "resnet18.pth")
    found = loaded(tmp_path, "resnet18.pth")
    assert any("torchvision:squeezenet1_1" in note for note in found.notes)


def test_an_unknown_network_names_the_cure(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ModelLoadFailed, match=r'weights = "model\.pth"'):
        loaded(tmp_path, "model.pth")
