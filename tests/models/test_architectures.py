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
from models.engine import Engine, Suspended
from models.imaging.render import normalise
from models.methods import METHODS
from models.sources import LoadedModel, load
from models.types import ClassRef, Explanation, Job, JobOptions, Outcome, Preprocess, Target
from models.warm_model import WarmModel
from models.warmup import warm_up
from models.weights import fill_zero_heads, seeded

define_missing_operators()
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg  # noqa: E402  (its operators come first)
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torchvision.models import maxvit, swin_transformer, vision_transformer  # noqa: E402

CLASSES = 9
TARGETS = tuple(Target(cls=ClassRef(kind="index", value=c)) for c in (0, 3, 5))

ATTENTION = {name for name, row in METHODS.items() if row.family == "transformer"}
GUIDED = {"guided_backprop", "guided_gradcam"}
SMOOTH = GUIDED | {"lrp"}  # refuse activations other than ReLU
"""Methods by what they refuse."""

BY_CHANNEL = {"ss_cam", "is_cam"}
"""Methods of so many passes that they run on small networks only; Score-CAM is the same code."""

LIVELY = {"eigencam", "gradcam_elementwise", "saliency", "input_x_gradient"}
"""Methods whose maps are never empty, unlike those that a final ReLU may empty."""

CONVOLUTIONAL = [
    ("torchvision:resnet18", 64, ATTENTION),
    ("torchvision:resnext50_32x4d", 64, ATTENTION),
    ("torchvision:regnet_x_400mf", 64, ATTENTION),
    ("torchvision:regnet_y_400mf", 64, ATTENTION | {"lrp"}),
    ("torchvision:vgg11", 64, ATTENTION | {"cam"}),
    ("torchvision:alexnet", 96, ATTENTION | {"cam"}),
    ("torchvision:squeezenet1_1", 64, ATTENTION | {"cam"}),
    ("torchvision:densenet121", 64, ATTENTION | {"cam"}),
    ("torchvision:mobilenet_v2", 64, ATTENTION),
    ("torchvision:mobilenet_v3_small", 160, ATTENTION | SMOOTH | {"cam"}),
    ("torchvision:efficientnet_b0", 64, ATTENTION | SMOOTH),
    ("torchvision:efficientnet_v2_s", 64, ATTENTION | SMOOTH),
    ("torchvision:convnext_tiny", 64, ATTENTION | SMOOTH | {"cam", "fullgrad"}),
    ("torchvision:googlenet", 64, ATTENTION),
    # With random weights, a layer of 6 x 6 positions hardly tells where a patch lies.
    ("torchvision:inception_v3", 128, ATTENTION | {"fullgrad"}),
    ("torchvision:mnasnet0_5", 64, ATTENTION),
    ("torchvision:shufflenet_v2_x0_5", 64, ATTENTION),
    ("timm:resnet18", 64, ATTENTION),
    ("timm:densenet121", 64, ATTENTION),
    ("timm:tf_efficientnet_lite0", 64, ATTENTION),
    ("timm:mobilenetv3_small_050", 160, ATTENTION | SMOOTH | {"cam"}),
    ("timm:convnext_atto", 64, ATTENTION | SMOOTH | {"cam", "fullgrad"}),
]


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
@pytest.mark.parametrize(("source", "side", "refused"), CONVOLUTIONAL)
def test_convolutional_networks(source, side, refused):
    entry = {"num_classes": CLASSES, "preprocess": {"crop": side, "resize": side}}
    spec = ModelSpec(name="m", source=source, weights="none", **entry)
    check(load(spec, Path()), refused=refused, left_out=frozenset(BY_CHANNEL))


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
