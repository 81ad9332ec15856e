"""Tiny vision transformers of torchvision and timm."""

from __future__ import annotations

from torch import nn

from models.compat import define_missing_operators

define_missing_operators()
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg  # noqa: E402  (its operators come first)
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torchvision.models import maxvit, swin_transformer, vision_transformer  # noqa: E402

CLASSES = 9


def timm_vit(kind: type[nn.Module] = VisionTransformer, **options) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    return kind(num_classes=CLASSES, **sizes | options)


def torchvision_vit() -> nn.Module:
    sizes = {"num_layers": 3, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 48}
    return vision_transformer.VisionTransformer(
        image_size=32, patch_size=8, num_classes=CLASSES, **sizes
    )


def torchvision_swin(**options) -> nn.Module:
    sizes = {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": [2, 2]}
    return swin_transformer.SwinTransformer(
        patch_size=[4, 4], num_classes=CLASSES, **sizes, **options
    )


def torchvision_swin_v2() -> nn.Module:
    return torchvision_swin(
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    )


def timm_swin(kind: type[nn.Module] = SwinTransformer) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 16}
    return kind(depths=(1, 1, 2), num_heads=(1, 2, 4), num_classes=CLASSES, **sizes)


def torchvision_maxvit() -> nn.Module:
    return maxvit.MaxVit(
        input_size=(64, 64), stem_channels=8, partition_size=2, block_channels=[8, 16, 16],
        block_layers=[1, 1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=CLASSES,
    )  # fmt: skip


def timm_maxvit() -> nn.Module:
    attention = MaxxVitTransformerCfg(dim_head=8, window_size=(2, 2), grid_size=(2, 2))
    sizes = MaxxVitCfg(
        embed_dim=(8, 16, 16), depths=(1, 1, 1), block_type=("M",) * 3, stem_width=8,
        transformer_cfg=attention,
    )  # fmt: skip
    return MaxxVit(sizes, img_size=64, num_classes=CLASSES)
