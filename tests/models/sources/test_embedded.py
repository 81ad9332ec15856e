"""The default model, with its real weights."""

from __future__ import annotations

import pytest
import torch
from skimage import data

from models.catalog import default_spec
from models.errors import ModelLoadFailed
from models.sources import load


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(default_spec(), tmp_path_factory.mktemp("base"))


@pytest.mark.real
@pytest.mark.parametrize(
    ("photograph", "labels"),
    [
        (data.chelsea, {"tabby", "tiger cat", "Egyptian cat"}),
        (data.coffee, {"espresso", "cup", "coffee mug"}),
        (data.rocket, {"missile", "projectile", "space shuttle"}),
    ],
)
def test_photographs_are_recognised(loaded, model_input, photograph, labels):
    pixels = model_input(photograph(), loaded.preprocess)
    best = int(loaded.module(torch.from_numpy(pixels)[None].float()).argmax())
    assert loaded.labels[best] in labels


@pytest.mark.real
def test_every_parameter_comes_from_the_package(loaded, tmp_path):
    random = load(default_spec().model_copy(update={"weights": "none"}), tmp_path).module
    start, state = random.state_dict(), loaded.module.state_dict()
    assert state.keys() == start.keys()
    kept = [key for key in state if torch.equal(state[key], start[key])]
    assert not [key for key in kept if not key.endswith("num_batches_tracked")]


@pytest.mark.real
def test_it_takes_a_checkpoint_with_another_head(loaded, spec_of, tmp_path):
    state = loaded.module.state_dict()
    state |= {"classifier.weight": torch.ones(3, 1280), "classifier.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "w.pth")
    entry = spec_of("embedded:efficientnet_lite0", weights="w.pth", num_classes=3)
    assert load(entry, tmp_path).num_classes == 3


def test_other_names_are_refused(spec_of, tmp_path):
    with pytest.raises(ModelLoadFailed, match="one embedded model is efficientnet_lite0"):
        load(spec_of("embedded:resnet18"), tmp_path)
