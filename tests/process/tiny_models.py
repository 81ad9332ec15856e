"""Tiny networks for `python:` models, distinguishable by their results."""

from __future__ import annotations

import torch
from torch import nn

SIDE = 32


class Constant(nn.Module):
    """Always finds the same class; the image hardly changes the scores."""

    def __init__(self, winner: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.add_(1e-3 * torch.arange(12).view(3, 4))
            self.head.bias[winner] = 10.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(torch.relu(self.body(x))).flatten(1))


def first() -> nn.Module:
    """Always class 0."""
    return Constant(0)


def second() -> nn.Module:
    """Always class 1."""
    return Constant(1)


def broken() -> nn.Module:
    """Fails to build."""
    raise RuntimeError("no such luck")
