"""Networks of images and texts score as transformers' own forward does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data as pictures

from models.catalog import ModelSpec
from models.compat import define_missing_operators
from models.errors import ModelLoadFailed
from models.sources import load
from models.warmup import warm_up
from tests.models.sources.clip import LABELS, SIGLIP_TOKENS, saved, spec_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
define_missing_operators()

PHOTOS = [Image.fromarray(pictures.chelsea()), Image.fromarray(pictures.coffee())]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_scores_are_those_of_the_whole_network(kind, tmp_path):
    model, tokenizer, processor = saved(tmp_path / "saved", kind)
    loaded = load(spec_of(), tmp_path)
    padding = (
        {"padding": "max_length", "max_length": SIGLIP_TOKENS}
        if kind == "siglip"
        else {"padding": True}
    )
    texts = tokenizer(LABELS, return_tensors="pt", **padding)
    inputs = torch.cat([torch.as_tensor(processor(p)["pixel_values"][0])[None] for p in PHOTOS])
    with torch.no_grad():
        expected = model.eval()(pixel_values=inputs, **texts).logits_per_image
    assert expected.std() > 1e-3
    texts = loaded.texts
    texts.encode(LABELS)
    scores, _ = texts.scores(tuple(LABELS))(loaded.module(inputs))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert loaded.labels == tuple(LABELS)
    assert loaded.declared_task == "zero_shot"
    assert loaded.task == ("multi_label" if kind == "siglip" else "single_label")


def test_every_kind_of_method_explains_it(tmp_path):
    saved(tmp_path / "saved", "clip")
    warm = warm_up(load(spec_of(), tmp_path), torch.device("cpu"), warmup_s=0.0)
    card = warm.info.card
    applicable = {row.name for row in card.methods if row.applicable}
    assert {
        "gradcam",
        "layercam",
        "scorecam",
        "rise",
        "saliency",
        "integrated_gradients",
    } <= applicable
    assert card.task == "zero_shot"
    assert any("texts" in note for note in card.notes)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["a photo of a cat"], "at least two"),
        (["a cat", "a " * 40], "42 tokens; the network takes 16"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, text):
    saved(tmp_path / "saved", "clip")
    with pytest.raises(ModelLoadFailed, match=text):
        load(spec_of(labels=labels), tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    saved(tmp_path / "saved", "clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).unlink()
    with pytest.raises(ModelLoadFailed, match="has no tokenizer"):
        load(spec_of(), tmp_path)


def test_a_folder_of_images_and_texts_gives_vectors_of_images_too(tmp_path):
    saved(tmp_path / "saved", "clip")
    loaded = load(spec_of(labels=None, task="embedding"), tmp_path)
    assert loaded.texts is None
    assert loaded.module(torch.zeros(2, 3, 32, 32)).shape == (2, 12)


def test_classes_of_a_folder_of_images_and_texts_are_no_indices(tmp_path):
    saved(tmp_path / "saved", "clip")
    with pytest.raises(ModelLoadFailed, match='set task = "embedding"'):
        load(spec_of(task="multi_label"), tmp_path)


def test_other_networks_score_no_texts(tmp_path: Path):
    spec = ModelSpec(name="m", source="timm:resnet10t", weights="none", task="zero_shot")
    with pytest.raises(ModelLoadFailed, match="CLIP or SigLIP"):
        load(spec, tmp_path)
