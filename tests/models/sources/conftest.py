"""Sources import torchvision and timm, which may need their missing operators defined first."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from models.catalog import ModelSpec
from models.compat import define_missing_operators
from models.imaging.decode import DecodeLimits, decode
from models.imaging.preprocess import preprocess
from models.types import Preprocess

define_missing_operators()


@pytest.fixture
def spec_of():
    """Makes a catalog entry with random weights."""

    def make(source: str, **fields) -> ModelSpec:
        return ModelSpec(**{"name": "m", "source": source, "weights": "none"} | fields)

    return make


@pytest.fixture
def model_input():
    """Makes the normalised model input (3, H, W) of a photograph, as the service does."""

    def make(photograph: np.ndarray, spec: Preprocess) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(photograph).save(file, "PNG")
        picture = decode(file.getvalue(), limits=DecodeLimits(), preprocess=spec)
        pixels, _ = preprocess(picture, spec)
        return ((pixels / 255 - np.array(spec.mean)) / np.array(spec.std)).transpose(2, 0, 1)

    return make
