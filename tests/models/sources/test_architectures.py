"""Target layer, layout and head of common architectures, probed with random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.head import HeadProbe, probe_head
from models.layer_choice import choose_target_layer, feature_layers
from models.layers import TokenLayout, to_map
from models.probe import probe_batch, trace
from models.sources import load
from models.types import Preprocess
from models.weights import fill_zero_heads, seeded
from tests.models.conftest import find_layouts
from tests.models.transformers import (
    timm_swin,
    timm_vit,
    torchvision_maxvit,
    torchvision_swin,
    torchvision_swin_v2,
    torchvision_vit,
)

SWIN = TokenLayout(grid=(2, 2), channels_last=True)
CLASS_TOKEN = TokenLayout(grid=(4, 4), prefix=1)
REGISTERS = TokenLayout(grid=(4, 4), prefix=5)


def probed(module: nn.Module, side: int) -> tuple[str, TokenLayout | None, HeadProbe]:
    """Target layer, its layout and its head; also checks what holds for all architectures."""
    probe = probe_batch(Preprocess(resize=side, crop=(side, side)))
    found = trace(module, "single_label", probe)
    layouts = find_layouts(found)
    target = choose_target_layer(found, layouts)
    assert target is not None
    laid_out = to_map(found.calls[target].output, layouts[target])
    assert laid_out.shape[0] == len(probe)
    assert laid_out.shape[2] * laid_out.shape[3] > 1
    features = feature_layers(found, layouts)
    assert 4 <= len(features) <= 12
    assert len(set(features)) == len(features)
    assert set(features) <= set(layouts)
    with torch.no_grad():
        first, last = (
            to_map(found.calls[f].output, layouts[f]) for f in (features[0], features[-1])
        )
    assert first.shape[2] >= last.shape[2]
    head = probe_head(module, target, layout=layouts[target], task="single_label", probe=probe)
    return target, layouts[target], head


@pytest.mark.parametrize(
    ("source", "side", "target", "head"),
    [
        ("torchvision:resnet18", 64, "layer4", "gap_linear"),
        ("torchvision:resnext50_32x4d", 64, "layer4", "gap_linear"),
        ("torchvision:regnet_x_400mf", 64, "trunk_output", "gap_linear"),
        ("torchvision:regnet_y_400mf", 64, "trunk_output", "gap_linear"),
        ("torchvision:vgg11", 64, "features.19", "flatten"),
        ("torchvision:alexnet", 96, "features.11", "flatten"),
        ("torchvision:squeezenet1_0", 64, "features", "flatten"),
        ("torchvision:squeezenet1_1", 64, "features", "flatten"),
        # torchvision's functional ReLU after the last norm is part of the head; timm's norm has it
        # inside.
        ("torchvision:densenet121", 64, "features", "flatten"),
        ("torchvision:mobilenet_v2", 96, "features", "gap_linear"),
        ("torchvision:mobilenet_v3_small", 96, "features", "gap"),
        ("torchvision:efficientnet_b0", 96, "features", "gap_linear"),
        ("torchvision:convnext_tiny", 64, "features", "gap"),
        ("torchvision:shufflenet_v2_x0_5", 64, "conv5", "gap_linear"),
        ("torchvision:mnasnet0_5", 64, "layers", "gap_linear"),
        ("torchvision:googlenet", 64, "inception5b", "gap_linear"),
        ("torchvision:inception_v3", 299, "Mixed_7c", "gap_linear"),
        ("timm:resnet18", 64, "layer4", "gap_linear"),
        ("timm:densenet121", 64, "features", "gap_linear"),
        ("timm:tf_efficientnet_lite0", 160, "bn2", "gap_linear"),
        ("timm:tf_efficientnetv2_b0", 64, "bn2", "gap_linear"),
        ("timm:mobilenetv3_small_050", 64, "blocks", "gap"),
        ("timm:regnetx_002", 64, "s4", "gap_linear"),
        ("timm:convnext_atto", 64, "stages", "gap"),
    ],
)
def test_convolutional_networks(spec_of, tmp_path, source, side, target, head):
    entry = spec_of(source, num_classes=20, preprocess={"crop": side, "resize": side})
    found, layout, probe = probed(load(entry, tmp_path).module, side)
    assert (found, layout, probe.kind) == (target, None, head)
    assert probe.closed_form == (head == "gap_linear")


def averaged_vit() -> nn.Module:
    return timm_vit(global_pool="avg", class_token=False, fc_norm=False)


@pytest.mark.parametrize(
    ("make", "side", "target", "layout", "head"),
    [
        (torchvision_vit, 32, "encoder.layers.encoder_layer_2.ln_1", CLASS_TOKEN, "token"),
        (timm_vit, 32, "blocks.2.norm1", CLASS_TOKEN, "token"),
        (lambda: timm_vit(reg_tokens=4), 32, "blocks.2.norm1", REGISTERS, "token"),
        (lambda: timm_vit(qk_norm=True), 32, "blocks.2.norm1", CLASS_TOKEN, "token"),
        # Averaged patches, then a norm: the class token is there but not read.
        (lambda: timm_vit(global_pool="avg"), 32, "blocks", CLASS_TOKEN, "gap"),
        (averaged_vit, 32, "norm", TokenLayout(grid=(4, 4)), "gap_linear"),
        (torchvision_swin, 32, "norm", SWIN, "gap_linear"),
        (torchvision_swin_v2, 32, "norm", SWIN, "gap_linear"),
        (timm_swin, 32, "norm", SWIN, "gap_linear"),
        (torchvision_maxvit, 64, "blocks.2", None, "gap"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fused", [True, False])
def test_transformers(monkeypatch, make, side, target, layout, head, fused):
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", int(fused))
    with seeded():
        module = make()
        fill_zero_heads(module)
    found, its_layout, probe = probed(module.eval().requires_grad_(False), side)
    assert (found, its_layout, probe.kind) == (target, layout, head)


def test_grids_of_a_vision_transformer_are_its_patch_embeddings():
    with seeded():
        module = timm_vit(reg_tokens=4).eval().requires_grad_(False)
    found = trace(module, "single_label", probe_batch(Preprocess(resize=32, crop=(32, 32))))
    layouts = find_layouts(found)
    assert layouts["patch_embed"] == TokenLayout(grid=module.patch_embed.grid_size)
    assert layouts["norm"] == TokenLayout(
        grid=module.patch_embed.grid_size, prefix=module.num_prefix_tokens
    )
    tokens: Tensor = found.calls["norm"].output
    patches = to_map(tokens, layouts["norm"])
    assert torch.equal(patches[0, :, 1, 2], tokens[0, module.num_prefix_tokens + 1 * 4 + 2])
