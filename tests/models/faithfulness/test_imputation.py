"""Imputation against the system written out densely, and against the authors' sparse solver."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import models.faithfulness.imputation
from models.compat import define_missing_operators
from models.faithfulness.imputation import impute

define_missing_operators()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer


def dense(image: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Every removed pixel is the weighted mean of its neighbours; solved in float64."""
    height, width = removed.shape
    places = [tuple(p) for p in np.argwhere(removed)]
    matrix, right = np.zeros((len(places), len(places))), np.zeros((len(places), 3))
    for row, (y, x) in enumerate(places):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy, dx) == (0, 0) or not (0 <= y + dy < height and 0 <= x + dx < width):
                    continue
                weight = 1 / 12 if dy and dx else 1 / 6
                matrix[row, row] += weight
                if removed[y + dy, x + dx]:
                    matrix[row, places.index((y + dy, x + dx))] -= weight
                else:
                    right[row] += weight * image[:, y + dy, x + dx]
    filled = image.copy()
    if places:
        filled[:, removed] = np.linalg.solve(matrix, right).T
    return filled


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("size", [(9, 11), (1, 8), (16, 5)])
def test_impute_solves_the_system(share, size, monkeypatch):
    monkeypatch.setattr(models.faithfulness.imputation, "RESIDUAL", 1e-6)
    rng = np.random.default_rng(7)
    image = rng.normal(size=(3, *size))
    removed = rng.random((2, *size)) < share
    removed[:, 0, 0] = False
    found = impute(torch.from_numpy(image).float(), torch.from_numpy(removed)).numpy()
    for filled, gone in zip(found, removed, strict=True):
        np.testing.assert_allclose(filled, dense(image, gone), atol=1e-4)
        np.testing.assert_array_equal(filled[:, ~gone], image.astype(np.float32)[:, ~gone])


def test_impute_is_the_authors(monkeypatch):
    """A hole at the border and one inside: the error at ROAD's residual is within its noise."""
    image = (
        torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0)).cumsum(1).cumsum(2) / 10
    )
    removed = torch.zeros(24, 24, dtype=torch.bool)
    removed[:9, 4:13] = removed[15:18, 14:20] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = NoisyLinearImputer(noise=0.0)(image, (~removed).float())
    found = impute(image, removed[None])[0]
    spread = float(image.std())
    assert (found - expected)[:, removed].square().mean().sqrt() < 0.01 * spread
    monkeypatch.setattr(models.faithfulness.imputation, "RESIDUAL", 1e-6)
    torch.testing.assert_close(
        impute(image, removed[None])[0], expected, rtol=0, atol=1e-3 * spread
    )


def test_a_plane_is_filled_with_its_colour():
    removed = torch.rand(2, 30, 20, generator=torch.Generator().manual_seed(2)) < 0.8
    image = torch.tensor([1.0, -2.0, 0.0])[:, None, None].expand(3, 30, 20)
    torch.testing.assert_close(
        impute(image, removed), image.expand(2, 3, 30, 20), rtol=0, atol=5e-3
    )
