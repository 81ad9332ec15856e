"""torchvision's architectures, and its preprocessing metadata against its own transforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from PIL import Image
from skimage import data
from torchvision.transforms import functional

from models.errors import ModelLoadFailed
from models.sources import BuildRequest, load, torchvision


def request(name: str, tmp_path, **fields) -> BuildRequest:
    options = {"pretrained": False, "num_classes": None, "base_dir": tmp_path} | fields
    return BuildRequest(name=name, **options)


@pytest.mark.parametrize("name", zoo.list_models(module=zoo))
def test_preprocessing_of_every_architecture_is_its_weights_own(name):
    transforms = zoo.get_model_weights(name).DEFAULT.transforms()
    ours = torchvision._preprocess(transforms)
    assert [ours.resize] == transforms.resize_size
    assert list(ours.crop) == transforms.crop_size * 2
    assert functional.InterpolationMode(ours.interpolation) == transforms.interpolation
    assert (list(ours.mean), list(ours.std)) == (transforms.mean, transforms.std)


def test_a_photograph_becomes_the_same_input(model_input):
    transforms = zoo.get_model_weights("efficientnet_b0").DEFAULT.transforms()
    spec = torchvision._preprocess(transforms)
    theirs = transforms(Image.fromarray(data.chelsea())).numpy()
    # One of 256 levels, as the imaging tests allow.
    assert np.abs(model_input(data.chelsea(), spec) - theirs).max() < 1.01 / 255 / min(spec.std)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out_of_networks_and_checkpoints(name, spec_of, tmp_path):
    with_heads = zoo.get_model(name, num_classes=4, aux_logits=True, init_weights=False)
    torch.save(with_heads.state_dict(), tmp_path / "w.pth")
    small = {"crop": 96, "resize": 96}
    entry = spec_of(f"torchvision:{name}", num_classes=4, weights="w.pth", preprocess=small)
    loaded = load(entry, tmp_path)
    module, probe = loaded.module, torch.randn(1, 3, 96, 96)
    assert torch.equal(module(probe), with_heads.eval()(probe))
    # Only the library's weights are known to want its rescaling of the input.
    assert not with_heads.transform_input
    assert "transform_input" in loaded.notes[0]
    # What the note names has the same effect.
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (loaded.preprocess.mean, loaded.preprocess.std)
    )
    with_heads.transform_input = True
    torch.testing.assert_close(module((probe * std + mean - 0.5) / 0.5), with_heads(probe))
    assert not any("aux" in key.lower() for key in module.state_dict())


def test_an_unknown_name_suggests_close_ones(tmp_path):
    with pytest.raises(ModelLoadFailed, match=r"model resnet_18\. Close names: resnet18"):
        torchvision.build(request("resnet_18", tmp_path))


def test_detectors_are_no_classifiers(tmp_path):
    with pytest.raises(ModelLoadFailed, match="no classification or segmentation model fasterrcnn"):
        torchvision.build(request("fasterrcnn_resnet50_fpn", tmp_path))


def test_weights_that_cannot_be_fetched_are_said_so(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise OSError("https://secret.example/ is unreachable")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ModelLoadFailed, match="cannot be fetched") as caught:
        torchvision.build(request("resnet18", tmp_path, pretrained=True))
    assert "secret" not in caught.value.message


def test_the_librarys_own_weights_are_loaded(monkeypatch, tmp_path):
    torch.manual_seed(4)
    stored = zoo.shufflenet_v2_x0_5().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: stored)
    module = torchvision.build(request("shufflenet_v2_x0_5", tmp_path, pretrained=True)).module
    assert torch.equal(module.fc.weight, stored["fc.weight"])


def test_the_librarys_weights_come_with_their_own_head(monkeypatch, spec_of, tmp_path):
    stored = zoo.shufflenet_v2_x0_5().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: stored)
    entry = spec_of("torchvision:shufflenet_v2_x0_5", weights="default", num_classes=4)
    with pytest.raises(ModelLoadFailed, match=r"1000 classes, but num_classes is 4\. The default"):
        load(entry, tmp_path)
