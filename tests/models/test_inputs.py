"""Inputs beside the image come from the configuration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.errors import ModelLoadFailed
from models.inputs import fill_inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, image, age, site=None):
        site = torch.zeros(len(image), dtype=torch.long) if site is None else site
        return self.fc(image.mean((2, 3))) + age.sum(1, keepdim=True) + site[:, None]


def test_values_are_repeated_for_every_image():
    images = torch.randn(3, 3, 8, 8)
    plain = Two()
    expected = plain(images, torch.full((3, 2), 0.5), torch.full((3,), 7))
    filled = fill_inputs(plain, {"age": [0.5, 0.5], "site": 7})
    assert torch.equal(filled(images), expected)
    assert [name for name, _ in filled.named_modules()] == ["", "fc"]
    assert filled.state_dict().keys() == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"sex": 1}, r"takes no input sex\. It takes: image, age, site"),
        ({"age": "old"}, r"inputs\.age is neither a number"),
        ({"age": [[1.0], [1.0, 2.0]]}, r"inputs\.age is neither a number"),
    ],
)
def test_what_cannot_be_filled_in_is_named(constants, message):
    with pytest.raises(ModelLoadFailed, match=message):
        fill_inputs(Two(), constants)
