"""Models prepared as the registry prepares them, for each runtime."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from models.catalog import ModelSpec
from models.sources import LoadedModel
from models.types import Preprocess
from models.warm_model import WarmModel
from models.warmup import warm_up
from tests.models.conftest import PoolNet, frozen

SIDE = 8


class Blocks(PoolNet):
    """`PoolNet` with a residual block, whose inner layers are not all fused."""

    def __init__(self, outputs: int = 5) -> None:
        super().__init__(classes=outputs)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        return self.fc(self.pool(self.out(self.body(self.block(x) + x))).flatten(1))


def blocks(outputs: int = 5) -> nn.Module:
    torch.manual_seed(6)
    return frozen(Blocks(outputs))


def warm(
    net: nn.Module,
    *,
    task: str = "single_label",
    classes: int = 5,
    proofs_dir: Path | None = None,
    **fields,
) -> WarmModel:
    """A copy of a network, loaded and prepared."""
    statistics = {
        "mean": (127.5 / 255,) * 3,
        "std": (64 / 255,) * 3,
    }  # as tests of the engine have it
    loaded = LoadedModel(
        module=copy.deepcopy(net),
        labels=tuple(map(str, range(classes))),
        num_classes=classes,
        task=task,
        preprocess=Preprocess(resize=SIDE, crop=(SIDE, SIDE), **statistics),
        spec=ModelSpec(name="tiny", source="python:tests:tiny", task=task, **fields),
    )
    return warm_up(loaded, torch.device("cpu"), warmup_s=0.01, proofs_dir=proofs_dir)


@pytest.fixture(scope="module", autouse=True)
def without_openvino() -> None:
    """Nothing is hidden: OpenVINO is what is tested here."""


@pytest.fixture(scope="module")
def on_torch() -> WarmModel:
    return warm(blocks(), runtime="torch")


@pytest.fixture(scope="module")
def on_openvino() -> WarmModel:
    return warm(blocks(), runtime="openvino")
