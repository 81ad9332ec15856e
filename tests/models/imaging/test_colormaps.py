from __future__ import annotations

from typing import get_args

import matplotlib as mpl
import numpy as np
import pytest

from models.imaging.colormaps import COLORMAPS, Colormap


@pytest.mark.parametrize("name", COLORMAPS)
def test_tables_equal_matplotlibs(name: str) -> None:
    expected = mpl.colormaps[name](np.arange(256))[:, :3] * 255
    assert COLORMAPS[name].shape == (256, 3)
    assert COLORMAPS[name].dtype == np.uint8
    assert np.abs(COLORMAPS[name] - expected).max() <= 0.5 + 1e-9


def test_names_and_order_are_the_contract_s() -> None:
    names = ("turbo", "viridis", "inferno", "magma", "jet", "gray", "coolwarm")
    assert tuple(COLORMAPS) == names == get_args(Colormap)


def test_nobody_can_change_a_table() -> None:
    with pytest.raises(ValueError, match="read-only"):
        COLORMAPS["jet"][0] = 0
    with pytest.raises(TypeError):
        COLORMAPS["jet"] = COLORMAPS["gray"]  # type: ignore[index] # that is the test
