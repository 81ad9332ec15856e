"""A tiny network with its configuration, and drawn images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NETWORK = """
from torch import nn


def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
"""

CONFIG = """
[server]
devices = ["cpu"]

[[models]]
name = "tiny"
source = "python:{module}:build"
weights = "none"
labels = ["cat", "dog", "Egyptian cat"]
num_classes = 3

[models.preprocess]
resize = 36
crop = 32
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Every test imports a module of its own.
    module = f"network_{abs(hash(tmp_path))}"
    (tmp_path / f"{module}.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "heatlens.toml"
    path.write_text(CONFIG.format(module=module))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with three images."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name, size in (("a.jpg", (50, 40)), ("b.png", (40, 64)), ("c.webp", (33, 33))):
        pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder
