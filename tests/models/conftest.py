"""Tiny random networks whose explanations can be worked out independently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.engine import Engine
from models.head import HeadProbe
from models.layers import Layouts
from models.probe import Trace
from models.proof import layouts_of, prove_layers
from models.types import LayerInfo, ModelCard, ModelInfo, Preprocess
from models.warm_model import WarmModel


@pytest.fixture
def every_precision(monkeypatch):
    """Half precision wherever the tests run, however slow it is there."""
    monkeypatch.setattr("models.preparation.optimise.has_instructions", lambda *_: True)


class HandNet(nn.Module):
    """Captum's `BasicModel_ConvNet_One_Conv`: every number of it can be checked by hand."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, 1)
        self.relu1 = nn.ReLU(inplace=inplace)
        self.fc1 = nn.Linear(8, 4)
        self.relu2 = nn.ReLU(inplace=inplace)
        self.conv1.weight = nn.Parameter(torch.ones(2, 1, 3, 3))
        self.conv1.bias = nn.Parameter(torch.tensor([-50.0, -75.0]))
        self.fc1.weight = nn.Parameter(torch.cat([torch.ones(4, 5), -torch.ones(4, 3)], 1))
        self.fc1.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu2(self.fc1(self.relu1(self.conv1(x)).flatten(1)))


class PoolNet(nn.Module):
    """Convolutions, global average pooling, one linear layer: gradients are constant."""

    def __init__(self, channels: int = 6, classes: int = 5, *, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=inplace)
        self.body = nn.Conv2d(4, channels, 3, padding=1, stride=2)
        self.out = nn.ReLU(inplace=inplace)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.out(self.body(self.act(self.stem(x))))).flatten(1))


class FlatNet(nn.Module):
    """Convolutions, then two linear layers over all positions: gradients vary."""

    def __init__(self, side: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.out = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(6 * (side // 2) ** 2, 12)
        self.fc2 = nn.Linear(12, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(self.out(self.body(self.act(self.stem(x)))).flatten(1)).tanh())


def find_layouts(traced: Trace) -> Layouts:
    """The layout of each layer of a traced network that is proved to be a map."""
    return layouts_of(prove_layers(traced))


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


@pytest.fixture
def hand_net() -> nn.Module:
    return frozen(HandNet())


@pytest.fixture
def hand_input() -> torch.Tensor:
    return torch.arange(16.0).view(1, 1, 4, 4)


@pytest.fixture
def pool_net() -> nn.Module:
    torch.manual_seed(1)
    return frozen(PoolNet())


@pytest.fixture
def flat_net() -> nn.Module:
    torch.manual_seed(2)
    return frozen(FlatNet())


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def warm_of(
    net: nn.Module,
    *,
    side: int = 8,
    classes: int = 5,
    target_layer: str = "out",
    linear: nn.Linear | None = None,
    task: str = "single_label",
    layouts: dict | None = None,
) -> WarmModel:
    """A warm model around a tiny network, made without the registry."""
    head = HeadProbe(kind="flatten", closed_form=False)
    if linear is not None:
        head = HeadProbe(
            kind="gap_linear",
            closed_form=True,
            weight=linear.weight.detach(),
            bias=linear.bias.detach(),
        )
    card = ModelCard(
        name="tiny",
        version="1",
        state="ready",
        ready=True,
        source="python:tests:tiny",
        num_classes=classes,
        input=Preprocess(resize=side, crop=(side, side)),
        target_layer=target_layer,
        best_batch=4,
    )
    layers = tuple(
        LayerInfo(
            name=name, type=type(m).__name__, output_shape=(6, 4, 4), spatial=True, parameters=0
        )
        for name, m in net.named_modules()
        if name in ("body", "out")
    )
    return WarmModel(
        name="tiny",
        version="1",
        module=net,
        device=torch.device("cpu"),
        dtype=torch.float32,
        scale=torch.full((1, 3, 1, 1), 1 / 64),
        shift=torch.full((1, 3, 1, 1), -127.5 / 64),
        task=task,
        target_layer=target_layer,
        head=head,
        layouts={"body": None, "out": None} | (layouts or {}),
        info=ModelInfo(card=card, layers=layers),
    )


class OneModel:
    """A registry that holds one model."""

    def __init__(self, warm: WarmModel) -> None:
        self.warm = warm

    def get(self, name: str, version: str) -> WarmModel:
        return self.warm


@pytest.fixture
def pool_engine(pool_net) -> Engine:
    return Engine(OneModel(warm_of(pool_net, linear=pool_net.fc)))


@pytest.fixture
def flat_engine(flat_net) -> Engine:
    return Engine(OneModel(warm_of(flat_net)))
