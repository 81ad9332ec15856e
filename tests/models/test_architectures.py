"""Every method on every common architecture: random weights, small inputs, the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import nn

from models.catalog import ModelSpec
from models.compat import define_missing_operators
from models.engine import Engine
from models.imaging.render import normalise
from models.methods import METHODS
from models.sources import LoadedModel, load
from models.suspended import Suspended
from models.types import ClassRef, Explanation, Job, JobOptions, Outcome, Preprocess, Target
from models.warm_model import WarmModel
from models.warmup import warm_up
from models.weights import fill_zero_heads, seeded
from tests.models.transformers import (
    CLASSES,
    timm_maxvit,
    timm_swin,
    timm_vit,
    torchvision_maxvit,
    torchvision_swin,
    torchvision_swin_v2,
    torchvision_vit,
)

define_missing_operators()
import timm  # noqa: E402  (torchvision's operators come first)
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2  # noqa: E402
from torchvision.models import AlexNet  # noqa: E402
from torchvision.models import convnext as convnexts  # noqa: E402
from torchvision.models import densenet as densenets  # noqa: E402
from torchvision.models import efficientnet as efficientnets  # noqa: E402
from torchvision.models import resnet as resnets  # noqa: E402
from torchvision.models import vgg as vggs  # noqa: E402

TARGETS = tuple(Target(cls=ClassRef(kind="index", value=c)) for c in (0, 3, 5))

ATTENTION = {name for name, row in METHODS.items() if row.family == "transformer"}
GUIDED = {"guided_backprop", "guided_gradcam"}
SMOOTH = GUIDED | {"lrp"}  # refuse activations other than ReLU
"""Methods by what they refuse."""

BY_CHANNEL = {"ss_cam", "is_cam"}
"""Methods of so many passes that they run on small networks only; Score-CAM is the same code."""

LIVELY = {"eigencam", "gradcam_elementwise", "saliency", "input_x_gradient"}
"""Methods whose maps are never empty, unlike those that a final ReLU may empty."""


# ---------------------------------------------------------------- convolutional networks


def resnet() -> nn.Module:
    return resnets.ResNet(resnets.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def resnext() -> nn.Module:
    return resnets.ResNet(
        resnets.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4, num_classes=CLASSES
    )


def perceptron(inputs: int) -> nn.Sequential:
    """The end of a VGG or an AlexNet, narrower."""
    hidden = [nn.Dropout(), nn.Linear(inputs, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32)]
    return nn.Sequential(*hidden, nn.ReLU(True), nn.Linear(32, CLASSES))


def vgg() -> nn.Module:
    net = vggs.VGG(vggs.make_layers([8, "M", 16, "M", 24, 24, "M", 32, 32, "M"]), CLASSES)
    net.classifier = perceptron(32 * 7 * 7)
    return net


def alexnet() -> nn.Module:
    net = AlexNet(CLASSES)
    net.classifier = perceptron(256 * 6 * 6)
    return net


def densenet() -> nn.Module:
    return densenets.DenseNet(
        growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=CLASSES
    )


def efficientnet_v2() -> nn.Module:
    fused, plain = efficientnets.FusedMBConvConfig, efficientnets.MBConvConfig
    stages = [fused(1, 3, 1, 8, 8, 1), fused(4, 3, 2, 8, 16, 2), plain(4, 3, 2, 16, 24, 2)]
    stages.append(plain(6, 3, 2, 24, 32, 2))
    return efficientnets.EfficientNet(
        stages, dropout=0.2, stochastic_depth_prob=0.0, last_channel=64, num_classes=CLASSES
    )


def convnext() -> nn.Module:
    stages = [(8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1)]
    return convnexts.ConvNeXt([convnexts.CNBlockConfig(*s) for s in stages], num_classes=CLASSES)


def timm_resnet() -> nn.Module:
    return timm.create_model("resnet18", layers=(1, 1, 1, 1), num_classes=CLASSES)


def timm_densenet() -> nn.Module:
    sizes = {"growth_rate": 8, "block_config": (2, 2, 2, 2)}
    return timm.create_model("densenet121", num_classes=CLASSES, **sizes)


CONVOLUTIONAL = [
    (resnet, 64, ATTENTION),
    (resnext, 64, ATTENTION),
    (vgg, 64, ATTENTION | {"cam"}),
    (alexnet, 96, ATTENTION | {"cam"}),
    (densenet, 64, ATTENTION | {"cam"}),
    (efficientnet_v2, 64, ATTENTION | SMOOTH),
    (convnext, 64, ATTENTION | SMOOTH | {"cam", "fullgrad"}),
    (timm_resnet, 64, ATTENTION),
    (timm_densenet, 64, ATTENTION),
    ("torchvision:regnet_x_400mf", 64, ATTENTION),
    ("torchvision:regnet_y_400mf", 64, ATTENTION | {"lrp"}),
    ("torchvision:squeezenet1_1", 64, ATTENTION | {"cam"}),
    ("torchvision:mobilenet_v2", 96, ATTENTION),
    ("torchvision:mobilenet_v3_small", 160, ATTENTION | SMOOTH | {"cam"}),
    ("torchvision:efficientnet_b0", 96, ATTENTION | SMOOTH),
    ("torchvision:googlenet", 96, ATTENTION),
    # With random weights, a layer of 6 x 6 positions hardly tells where a patch lies.
    ("torchvision:inception_v3", 128, ATTENTION | {"cam"}),
    ("torchvision:mnasnet0_5", 96, ATTENTION),
    ("torchvision:shufflenet_v2_x0_5", 64, ATTENTION),
    ("timm:tf_efficientnet_lite0", 160, ATTENTION),
    ("timm:mobilenetv3_small_050", 160, ATTENTION | SMOOTH | {"cam"}),
    ("timm:convnext_atto", 64, ATTENTION | SMOOTH | {"cam", "fullgrad"}),
]
"""Narrow networks of the families whose named ones are large, and small named ones.

`tests/models/sources/test_architectures.py` probes the large ones as well."""

TOKENS = SMOOTH | {"cam", "fullgrad"}
TRANSFORMERS = [
    (timm_vit, 32, TOKENS),
    (lambda: timm_vit(reg_tokens=4), 32, TOKENS),
    (lambda: timm_vit(global_pool="avg"), 32, TOKENS),
    (lambda: timm_vit(VisionTransformerDistilled), 32, TOKENS),
    (torchvision_vit, 32, TOKENS),
    (torchvision_swin, 32, TOKENS - {"cam"} | ATTENTION),
    (torchvision_swin_v2, 32, TOKENS - {"cam"} | ATTENTION),
    (timm_swin, 32, TOKENS - {"cam"} | ATTENTION),
    (lambda: timm_swin(SwinTransformerV2), 32, TOKENS - {"cam"} | ATTENTION),
    (torchvision_maxvit, 64, TOKENS | ATTENTION),
    (timm_maxvit, 64, TOKENS - {"cam"} | ATTENTION),
]


class OneModel:
    """A registry that holds one model."""

    def __init__(self, warm: WarmModel) -> None:
        self.warm = warm

    def get(self, name: str, version: str) -> WarmModel:
        return self.warm


def warmed(loaded: LoadedModel, *, chunk: int = 64) -> WarmModel:
    """The model as the registry warms it up, with a batch size that does not vary."""
    warm = warm_up(loaded, torch.device("cpu"), warmup_s=0.0)
    card = structs.replace(warm.info.card, best_batch=chunk)
    return replace(warm, info=structs.replace(warm.info, card=card))


def hooks_of(module: nn.Module) -> list[int]:
    return [
        len(group)
        for child in module.modules()
        for name, group in vars(child).items()
        if name.endswith("_hooks")
    ]


def explained(warm: WarmModel, methods: tuple[str, ...], *, layers=None) -> list[Explanation]:
    """Explanations of one noisy picture, with few samples and steps."""
    height, width = warm.input_size
    noise = np.random.default_rng(0)
    job = Job(
        id="0",
        operation="explain",
        model="m",
        version="1",
        input=noise.integers(0, 256, (height, width, 3), dtype=np.uint8),
        options=JobOptions(
            methods=methods,
            layers=layers or (warm.target_layer,),
            targets=TARGETS,
            samples=2,
            steps=3,
        ),
    )
    engine = Engine(OneModel(warm))
    answer = engine.run([job])[0]
    while isinstance(answer, Suspended):
        answer = engine.advance([answer])[0]
    assert isinstance(answer, Outcome), answer
    return list(answer.explanations)


def check(
    loaded: LoadedModel, *, refused: set[str], left_out: frozenset[str] = frozenset()
) -> None:
    """The target layer is a map, every method answers or says why not, nothing is left."""
    warm = warmed(loaded)
    card = warm.info.card
    reasons = {row.name: row.reason for row in card.methods if not row.applicable}
    assert set(reasons) == refused
    assert all(reasons.values())
    (recommended,) = [layer for layer in warm.info.layers if layer.recommended]
    assert recommended.name == warm.target_layer
    assert recommended.spatial
    assert {row.name for row in card.methods} == set(METHODS)
    applicable = tuple(
        row.name for row in card.methods if row.applicable and row.name not in left_out
    )
    before, hooks = (
        {k: v.clone() for k, v in warm.module.state_dict().items()},
        hooks_of(warm.module),
    )
    found = explained(warm, applicable)
    assert [e.method for e in found] == [name for name in applicable for _ in TARGETS]
    for explanation in found:
        assert explanation.map.dtype == np.float32
        assert np.isfinite(explanation.map).all()
        assert min(explanation.map.shape) > 1
        assert not any("not finite" in warning for warning in explanation.warnings)
        if not explanation.degenerate:
            unit = normalise(explanation.map, signed=explanation.signed)
            assert unit is not None
            assert 0 <= unit.min() <= unit.max() <= 1
    drawn = {e.method for e in found if not e.degenerate}
    assert drawn >= LIVELY
    assert drawn >= (ATTENTION - refused)
    assert hooks_of(warm.module) == hooks
    assert all(torch.equal(v, before[k]) for k, v in warm.module.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("network", "side", "refused"), CONVOLUTIONAL)
def test_convolutional_networks(network, side, refused):
    entry = {"num_classes": CLASSES, "preprocess": {"crop": side, "resize": side}}
    if isinstance(network, str):
        found = load(ModelSpec(name="m", source=network, weights="none", **entry), Path())
    else:
        found = loaded(network, side)
    check(found, refused=refused, left_out=frozenset(BY_CHANNEL))


def loaded(make: Callable[[], nn.Module], side: int, precision: str = "fp32") -> LoadedModel:
    with seeded():
        module = make()
        fill_zero_heads(module)
    return LoadedModel(
        spec=ModelSpec(name="m", source="python:tests:net", weights="none", precision=precision),
        module=module.eval().requires_grad_(False),
        labels=tuple(map(str, range(CLASSES))),
        num_classes=CLASSES,
        task="single_label",
        preprocess=Preprocess(resize=side, crop=(side, side)),
    )


@pytest.mark.parametrize(("make", "side", "refused"), TRANSFORMERS)
def test_transformers(make, side, refused):
    check(loaded(make, side), refused=refused)


@pytest.mark.parametrize(
    ("make", "side"), [(timm_vit, 32), (torchvision_swin, 32), (torchvision_maxvit, 64)]
)
def test_methods_answer_in_half_precision_as_in_single(make, side, every_precision):
    warm, half = (warmed(loaded(make, side, precision)) for precision in ("fp32", "bf16"))
    assert half.dtype == torch.bfloat16
    methods = tuple(row.name for row in warm.info.card.methods if row.applicable)
    pairs = zip(explained(warm, methods), explained(half, methods), strict=True)
    alike = {
        a.method: float(np.corrcoef(a.map.ravel(), b.map.ravel())[0, 1])
        for a, b in pairs
        if not (a.degenerate or b.degenerate)
    }
    assert alike.keys() >= LIVELY
    assert np.median(list(alike.values())) > 0.95, alike


@pytest.mark.parametrize(
    ("make", "side"), [(timm_vit, 32), (torchvision_swin, 32), (torchvision_maxvit, 64)]
)
def test_every_map_of_a_model_can_be_explained(make, side):
    """Not only the target layer: all layouts that one model has, early and late."""
    warm = warmed(loaded(make, side))
    methods = tuple(
        row.name
        for row in warm.info.card.methods
        if row.applicable and row.name != "cam" and not METHODS[row.name].of_input
    )
    for layer in warm.info.feature_layers:
        found = explained(warm, methods, layers=(layer,))
        assert len(found) == len(methods) * len(TARGETS)
        assert all(np.isfinite(e.map).all() for e in found)
        assert not all(e.degenerate for e in found)
