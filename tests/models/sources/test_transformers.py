"""Folders of transformers give what its own pipeline gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as pictures

from models.compat import define_missing_operators
from models.errors import ModelLoadFailed
from models.imaging.decode import DecodeLimits, from_pixels
from models.imaging.preprocess import preprocess
from models.sources import load

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
define_missing_operators()
PHOTO = pictures.chelsea()


def vit(labels: int = 5, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
            num_labels=labels,
            **config,
        )
    )


def convnext() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_labels=3)
    )


PROCESSORS = {
    "squash": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    "short side": (
        "ViTImageProcessor",
        {
            "size": {"shortest_edge": 39},
            "crop_size": {"height": 32, "width": 32},
            "do_center_crop": True,
            "resample": 3,
            "image_mean": [0.1, 0.2, 0.3],
        },
    ),
    "signed": (
        "ViTImageProcessor",
        {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3},
    ),
    "not normalised": (
        "ViTImageProcessor",
        {"size": {"height": 32, "width": 32}, "do_normalize": False},
    ),
}


def saved(folder, network, processor: tuple[str, dict]) -> None:
    network.save_pretrained(folder)
    kind, fields = processor
    content = {**fields, "image_processor_type": kind}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def scores_of(loaded) -> dict[str, float]:
    spec = loaded.preprocess
    image = from_pixels(PHOTO, limits=DecodeLimits(), preprocess=spec)
    pixels = torch.from_numpy(preprocess(image, spec)[0]).permute(2, 0, 1)[None].double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (spec.mean, spec.std))
    with torch.no_grad():
        scores = loaded.module(((pixels - mean) / std).float())[0]
    scale = scores.sigmoid() if loaded.task == "multi_label" else scores.softmax(0)
    return dict(zip(loaded.labels, scale.tolist(), strict=True))


@pytest.mark.parametrize("name", PROCESSORS)
def test_scores_are_those_of_the_pipeline(tmp_path, spec_of, name):
    saved(tmp_path / "saved", vit(id2label=dict(enumerate("abcde"))), PROCESSORS[name])
    loaded = load(spec_of("transformers:saved", weights="default"), tmp_path)
    assert loaded.notes == ("The scores are `logits` of what the network returns.",)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    pipeline = transformers.pipeline(
        "image-classification", model=str(tmp_path / "saved"), image_processor=processor
    )
    answer = {row["label"]: row["score"] for row in pipeline(Image.fromarray(PHOTO))}
    assert scores_of(loaded) == pytest.approx(answer, abs=1e-4)


def test_convnext_has_a_margin_of_its_own(tmp_path, spec_of):
    processor = ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.875})
    saved(tmp_path / "saved", convnext(), processor)
    loaded = load(spec_of("transformers:saved", weights="default"), tmp_path)
    assert (loaded.preprocess.resize, loaded.preprocess.crop) == (73, (64, 64))
    own = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    expected = own(Image.fromarray(PHOTO))["pixel_values"][0]
    image = from_pixels(PHOTO, limits=DecodeLimits(), preprocess=loaded.preprocess)
    found = preprocess(image, loaded.preprocess)[0].transpose(2, 0, 1) / 255
    np.testing.assert_allclose((found - 0.5) / 0.5, expected, atol=1e-5)
    assert loaded.labels == ("class 0", "class 1", "class 2")


def test_the_task_comes_with_the_folder(tmp_path, spec_of):
    network = vit(problem_type="multi_label_classification")
    saved(tmp_path / "saved", network, PROCESSORS["squash"])
    assert load(spec_of("transformers:saved", weights="default"), tmp_path).task == "multi_label"
    assert (
        load(spec_of("transformers:saved", weights="default", task="single_label"), tmp_path).task
        == "single_label"
    )
    saved(tmp_path / "one", vit(1), PROCESSORS["squash"])
    loaded = load(spec_of("transformers:one", weights="default"), tmp_path)
    assert (loaded.task, loaded.num_classes) == ("binary", 2)


def test_steps_that_are_not_known_are_said(tmp_path, spec_of):
    kind = (
        "EfficientNetImageProcessor",
        {"size": {"height": 32, "width": 32}, "include_top": True},
    )
    saved(tmp_path / "saved", vit(), kind)
    loaded = load(spec_of("transformers:saved", weights="default"), tmp_path)
    assert any("Not every step of the folder's EfficientNet" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "not a folder that save_pretrained wrote"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'),
            "of type IA3. Merge it .*merge_and_unload",
        ),
        (lambda f: (f / "config.json").write_text('{"auto_map": {}}'), "code of its own"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "reads no network"),
        (lambda f: (f / "model.safetensors").unlink(), "reads no network"),
    ],
)
def test_folders_that_hold_no_classifier(tmp_path, spec_of, break_, message):
    saved(tmp_path / "saved", vit(), PROCESSORS["squash"])
    break_(tmp_path / "saved")
    with pytest.raises(ModelLoadFailed, match=message):
        load(spec_of("transformers:saved", weights="default"), tmp_path)


def test_a_network_without_its_classifier_is_refused(tmp_path, spec_of):
    saved(tmp_path / "saved", vit().vit, PROCESSORS["squash"])
    with pytest.raises(ModelLoadFailed, match=r"lack classifier\.bias.*without its classifier"):
        load(spec_of("transformers:saved", weights="default"), tmp_path)
