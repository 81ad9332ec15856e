"""A small network for digits; the configuration names `build`."""

from __future__ import annotations

from torch import nn


def build(num_classes: int = 10) -> nn.Module:
    """Three blocks of convolutions, global average pooling, and a linear head."""
    return nn.Sequential(
        *block(3, 16, stride=2),
        *block(16, 32, stride=2),
        *block(32, 64, stride=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


def block(channels: int, width: int, *, stride: int) -> list[nn.Module]:
    """A convolution with its batch norm and rectifier."""
    convolution = nn.Conv2d(channels, width, 5, stride=stride, padding=2, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]
