"""From a catalog entry to a loaded model: verification, labels, checkpoints, preprocessing."""

from __future__ import annotations

import pytest
import torch

from models.errors import ModelLoadFailed
from models.sources import SOURCES, load

TINY = "torchvision:shufflenet_v2_x0_5"
SMALL = {"crop": 32, "resize": 32}


def test_every_source_that_the_catalog_allows_is_in_the_table(spec_of):
    for name in SOURCES:
        assert spec_of(f"{name}:x").source == f"{name}:x"
    with pytest.raises(ValueError, match="source"):
        spec_of("hub:x")


def test_a_loaded_model_is_frozen_and_in_eval_mode(spec_of, tmp_path):
    loaded = load(spec_of(TINY, preprocess=SMALL), tmp_path)
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.num_classes == len(loaded.labels) == 1000
    assert loaded.labels[:2] == ("tench", "goldfish")


def test_weights_of_another_digest_are_not_loaded(spec_of, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"other weights")
    spec = spec_of(TINY, weights="a.pt", weights_sha256="0" * 64, preprocess=SMALL)
    with pytest.raises(ModelLoadFailed, match="weights_sha256"):
        load(spec, tmp_path)


def test_labels_set_the_size_of_the_head(spec_of, tmp_path):
    loaded = load(spec_of(TINY, labels=["a", "b", "c"], preprocess=SMALL), tmp_path)
    assert (loaded.num_classes, loaded.labels) == (3, ("a", "b", "c"))


def test_classes_without_names_are_numbered(spec_of, tmp_path):
    loaded = load(spec_of(TINY, num_classes=3, preprocess=SMALL), tmp_path)
    assert loaded.labels == ("class 0", "class 1", "class 2")


def test_a_binary_model_is_one_logit_with_two_labels(spec_of, tmp_path):
    loaded = load(spec_of(TINY, labels=["ok", "bad"], task="binary", preprocess=SMALL), tmp_path)
    assert loaded.module(torch.zeros(1, 3, 32, 32)).shape == (1, 1)
    assert (loaded.num_classes, loaded.labels) == (2, ("ok", "bad"))


def test_too_many_labels_are_refused(spec_of, tmp_path):
    entry = spec_of(TINY, num_classes=3, labels=["a", "b"], preprocess=SMALL)
    with pytest.raises(ModelLoadFailed, match="2 labels, but the model has 3 classes"):
        load(entry, tmp_path)


def test_a_checkpoint_gives_the_scores_of_the_model_it_was_saved_from(spec_of, tmp_path):
    first = load(spec_of(TINY, num_classes=3, preprocess=SMALL), tmp_path).module
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "w.pth")
    entry = spec_of(TINY, num_classes=3, weights="w.pth", preprocess=SMALL)
    probe = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(entry, tmp_path).module(probe), first(probe))


def test_a_checkpoint_with_another_head_is_refused_with_a_hint(spec_of, tmp_path):
    first = load(spec_of(TINY, num_classes=3, preprocess=SMALL), tmp_path).module
    torch.save(first.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelLoadFailed, match=r"fc\.weight \(3x1024 instead of 4x1024\).*num_cl"):
        load(spec_of(TINY, num_classes=4, weights="w.pth", preprocess=SMALL), tmp_path)


def test_damaged_weights_are_noticed_by_the_probe(spec_of, tmp_path):
    first = load(spec_of(TINY, num_classes=3, preprocess=SMALL), tmp_path).module
    with torch.no_grad():
        first.conv1[0].weight[0, 0, 0, 0] = float("nan")
    torch.save(first.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelLoadFailed, match="not finite"):
        load(spec_of(TINY, num_classes=3, weights="w.pth", preprocess=SMALL), tmp_path)


def test_an_input_too_small_for_the_network_is_named(spec_of, tmp_path):
    entry = spec_of("torchvision:alexnet", preprocess={"crop": 16, "resize": 16})
    with pytest.raises(ModelLoadFailed, match=r"error in its layer features\.5 .* 16 x 16 pixels"):
        load(entry, tmp_path)


def test_a_crop_beyond_the_resized_picture_is_refused(spec_of, tmp_path):
    with pytest.raises(ModelLoadFailed, match=r"crop 320 is larger than preprocess\.resize 300"):
        load(spec_of("torchvision:resnet18", preprocess={"crop": 320, "resize": 300}), tmp_path)


def test_overrides_of_the_preprocessing_keep_the_rest(spec_of, tmp_path):
    override = {"crop": 48, "interpolation": "nearest", "mean": (0.1, 0.2, 0.3)}
    merged = load(spec_of(TINY, preprocess=override), tmp_path).preprocess
    assert (merged.resize, merged.crop, merged.interpolation) == (55, (48, 48), "nearest")
    assert (merged.mean, merged.std) == ((0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
