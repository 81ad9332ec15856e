"""timm's architectures, and its data configurations against its own transforms."""

from __future__ import annotations

import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data
from timm.data import create_transform, resolve_model_data_config

from models.errors import ModelLoadFailed
from models.sources import BuildRequest, load
from models.sources import timm as source


def request(name: str, tmp_path, **fields) -> BuildRequest:
    options = {"pretrained": False, "num_classes": None, "base_dir": tmp_path} | fields
    return BuildRequest(name=name, **options)


def module_of(name: str) -> types.SimpleNamespace:
    """What `resolve_model_data_config` reads of a model, without building it."""
    config = timm.get_pretrained_cfg(name)
    return types.SimpleNamespace(pretrained_cfg=config.to_dict(), num_classes=config.num_classes)


@pytest.mark.parametrize(
    ("name", "fit"),
    [
        ("resnet50.a1_in1k", "short side"),  # center, bicubic
        ("resnet18.tv_in1k", "short side"),  # center, bilinear
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "short side"),
        ("dm_nfnet_f1.dm_in1k", "stretch"),  # squash
        ("convnext_tiny.in12k_ft_in1k_384", "stretch"),
    ],
)
@pytest.mark.parametrize("photograph", [data.chelsea, data.rocket])
def test_a_photograph_becomes_the_same_input(name, fit, photograph, model_input):
    module = module_of(name)
    spec = source._preprocess(module)
    transform = create_transform(**resolve_model_data_config(module))
    theirs = transform(Image.fromarray(photograph())).numpy()
    # One of 256 levels, as the imaging tests allow.
    assert np.abs(model_input(photograph(), spec) - theirs).max() < 1.01 / 255 / min(spec.std)
    assert fit == (spec.fit if isinstance(spec.resize, tuple) else "short side")


@pytest.mark.parametrize(("mode", "fit"), [("border", "contain"), ("center", "cover")])
def test_other_crop_modes(mode, fit, model_input):
    config = module_of("resnet18.tv_in1k").pretrained_cfg
    config |= {"crop_mode": mode, "input_size": (3, 96, 128), "crop_pct": 0.9}
    module = types.SimpleNamespace(pretrained_cfg=config)
    spec = source._preprocess(module)
    transform = create_transform(**resolve_model_data_config(module))
    theirs = transform(Image.fromarray(data.chelsea())).numpy()
    assert np.abs(model_input(data.chelsea(), spec) - theirs).max() < 1.01 / 255 / min(spec.std)
    assert spec.fit == fit


def test_every_configuration_of_the_library_can_be_read():
    for name in timm.list_pretrained()[::7]:
        module = module_of(name)
        if module.pretrained_cfg["input_size"][0] == 3:
            ours = source._preprocess(module)
            assert list(ours.crop) == list(module.pretrained_cfg["input_size"][1:])


def test_labels_of_imagenet_are_known(tmp_path):
    labels = source.build(request("mobilenetv3_small_050", tmp_path)).labels
    assert (len(labels), labels[281]) == (1000, "tabby, tabby cat")


def test_a_new_head(spec_of, tmp_path):
    small = {"crop": 32, "resize": 32}
    loaded = load(spec_of("timm:mobilenetv3_small_050", num_classes=7, preprocess=small), tmp_path)
    assert (loaded.num_classes, loaded.labels[0]) == (7, "class 0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet_50", "timm has no model resnet_50. Close names: resnet50"),
        ("hf-hub:timm/resnet50", "timm has no model hf-hub:timm/resnet50"),
        ("resnet50.nobody", r"no weights resnet50\.nobody\. Known: resnet50\.a1_in1k"),
        ("vit_base_patch16_siglip_224", "has no classifier; configure num_classes"),
    ],
)
def test_what_cannot_be_built_is_said(name, message, tmp_path, monkeypatch):
    empty = types.SimpleNamespace(num_classes=0)
    if "siglip" in name:  # the real one takes a second and 370 MB
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: empty)
    with pytest.raises(ModelLoadFailed, match=message):
        source.build(request(name, tmp_path))


def test_weights_that_cannot_be_fetched_are_said_so(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise OSError("https://secret.example/ is unreachable")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ModelLoadFailed, match="cannot be fetched") as caught:
        source.build(request("resnet18", tmp_path, pretrained=True))
    assert "secret" not in caught.value.message


def test_grey_networks(spec_of, tmp_path):
    grey = {"crop": 64, "channels": 1, "mean": [0.13], "std": [0.31]}
    loaded = load(spec_of("timm:resnet10t", num_classes=4, preprocess=grey), tmp_path)
    assert loaded.module(torch.randn(1, 1, 64, 64)).shape == (1, 4)
    assert (loaded.preprocess.mean, loaded.preprocess.std) == ((0.13,), (0.31,))


def test_random_heads_of_zeros_are_filled(spec_of, tmp_path):
    loaded = load(spec_of("timm:mixer_s32_224"), tmp_path)
    assert loaded.module(torch.randn(1, 3, 224, 224)).std() > 0


def test_a_folder_of_save_for_hf(spec_of, tmp_path):
    from timm.models import save_for_hf

    network = timm.create_model("resnet10t", num_classes=3)
    network.pretrained_cfg.update(input_size=(3, 64, 64), crop_pct=1.0)
    config = {"label_names": ["cat", "dog", "fox"]}
    save_for_hf(network.eval(), tmp_path / "saved", model_config=config)
    loaded = load(spec_of("timm:saved", weights="default"), tmp_path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), network(images))
    assert loaded.labels == ("cat", "dog", "fox")
    assert (loaded.preprocess.resize, loaded.preprocess.crop) == (64, (64, 64))
    (tmp_path / "saved" / "config.json").write_text("{}")
    with pytest.raises(ModelLoadFailed, match="timm cannot read a model from saved"):
        load(spec_of("timm:saved", weights="default"), tmp_path)
