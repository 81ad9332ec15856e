"""A model in this process, on a tiny network of the caller's own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import heatlens

NETWORK = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    model = heatlens.load(
        "python:tiny:build",
        name="tiny",
        weights="none",
        num_classes=3,
        labels=["a", "b", "c"],
        device="cpu",
        preprocess={"resize": 32, "crop": 32},
    )
    with model:
        yield model


def test_a_model_of_ones_own_is_explained(model):
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    response = model.explain(picture, outputs=["overlay", "values"])
    assert response.top1.label in "abc"
    assert response.explanation.values.shape == (8, 8)
    assert response.explanation.overlay.size == (32, 32)
    assert model.labels == ["a", "b", "c"]
    assert model.card.name == "tiny"
    assert [layer.name for layer in model.layers if layer.recommended]
    assert model.predict(picture).top1.score == pytest.approx(response.top1.score, abs=1e-4)
    assert model.features(picture).features
    with pytest.raises(heatlens.APIError) as caught:
        model.explain(picture, layers=["nowhere"])
    assert caught.value.code == "unknown_layer"
    assert "torch" in sys.modules


def test_a_model_that_cannot_be_loaded_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(heatlens.LoadFailed, match=r"absent\.pth"):
        heatlens.load("resnet18", weights="absent.pth", device="cpu")


def test_a_model_that_is_never_closed_lets_the_process_end(tmp_path):
    (tmp_path / "tiny.py").write_text(NETWORK)
    program = (
        "import heatlens\n"
        "model = heatlens.load('python:tiny:build', weights='none', num_classes=3, device='cpu',\n"
        "    name='tiny', preprocess={'resize': 32, 'crop': 32})\n"
        "print(model.card.name)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "tiny\n", "")
