"""A small network of each family, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from models.compat import define_missing_operators
from models.weights import fill_zero_heads
from tests.models.conftest import frozen

CLASSES = 5

_WINDOWS = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
_TOKENS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_FINE = {"img_size": 64, "patch_size": 8}


def _torchvision(name: str, **options) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, num_classes=CLASSES, **options)


def _timm(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES, **options)


def _resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def _vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    net = VGG(make_layers([8, "M", 16, "M", 24, 24, "M"], batch_norm=True), num_classes=CLASSES)
    net.classifier = nn.Sequential(
        nn.Linear(24 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, CLASSES)
    )
    return net


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    )


FAMILIES: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "ResNet": (64, _resnet),
    "DenseNet": (
        64,
        partial(_timm, "densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    ),
    "VGG": (64, _vgg),
    "MobileNet": (64, partial(_torchvision, "mobilenet_v3_small")),
    "EfficientNet": (64, partial(_torchvision, "efficientnet_b0", stochastic_depth_prob=0.0)),
    "ConvNeXt": (
        64,
        partial(_timm, "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    ),
    "ShuffleNet": (64, partial(_torchvision, "shufflenet_v2_x0_5")),
    "Inception": (
        80,
        partial(_torchvision, "inception_v3", aux_logits=False, init_weights=False),
    ),
    "ViT": (64, partial(_timm, "vit_tiny_patch16_224", **_TOKENS, **_FINE)),
    "ViT with registers": (
        64,
        partial(_timm, "vit_small_patch14_reg4_dinov2", **_TOKENS, **_FINE),
    ),
    "DeiT": (64, partial(_timm, "deit_tiny_distilled_patch16_224", **_TOKENS, **_FINE)),
    "Swin": (64, partial(_timm, "swin_tiny_patch4_window7_224", **_WINDOWS, img_size=64)),
    "MaxViT": (64, _maxvit),
    "MobileViT": (64, partial(_timm, "mobilevit_xxs")),
    "Hiera": (
        64,
        partial(_timm, "hiera_tiny_224", img_size=(64, 64), embed_dim=16, stages=(1, 1, 2, 1)),
    ),
    "EVA": (64, partial(_timm, "eva02_tiny_patch14_224", **_TOKENS, **_FINE)),
    "BEiT": (64, partial(_timm, "beit_base_patch16_224", **_TOKENS, **_FINE)),
}
"""By name of a family: the side of its images, and how a network is made."""


def network(family: str) -> nn.Module:
    torch.manual_seed(0)
    define_missing_operators()
    net = FAMILIES[family][1]()
    fill_zero_heads(net)
    return frozen(net)
