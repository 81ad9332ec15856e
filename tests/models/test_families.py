"""Every layer of a small network of each family: right to float64 autograd, or refused."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.catalog import ModelSpec
from models.compat import define_missing_operators
from models.engine import Engine
from models.hooks import HookStack
from models.layers import to_map
from models.sources import LoadedModel
from models.types import Failure, Intervention, Job, Outcome, Preprocess, Target
from models.warm_model import WarmModel
from models.warmup import warm_up
from models.weights import fill_zero_heads
from tests.models.conftest import OneModel, frozen
from tests.models.test_engine import finish, index, job, normalised

CLASSES = 5
TARGET = 3

WINDOWS = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
TOKENS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES: dict[str, tuple[int, dict]] = {
    "torchvision:resnet18": (64, {}),
    "torchvision:mobilenet_v3_small": (64, {}),
    "torchvision:shufflenet_v2_x0_5": (64, {}),
    "torchvision:efficientnet_b0": (64, {}),
    "timm:densenet121": (64, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "timm:convnext_atto": (64, {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
    "timm:vit_tiny_patch16_224": (64, {**TOKENS, "img_size": 64}),
    "timm:vit_small_patch14_reg4_dinov2": (56, {**TOKENS, "img_size": 56}),
    "timm:deit_tiny_distilled_patch16_224": (64, {**TOKENS, "img_size": 64}),
    "timm:beit_base_patch16_224": (64, {**TOKENS, "img_size": 64}),
    "timm:eva02_tiny_patch14_224": (56, {**TOKENS, "img_size": 56}),
    "timm:swin_tiny_patch4_window7_224": (64, {**WINDOWS, "img_size": 64}),
    "timm:mobilevit_xxs": (64, {}),
    "timm:hiera_tiny_224": (64, {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 2, 1)}),
}


def network(name: str) -> tuple[nn.Module, int]:
    source, _, kind = name.partition(":")
    side, options = FAMILIES[name]
    torch.manual_seed(0)
    define_missing_operators()
    if source == "timm":
        import timm

        net = timm.create_model(kind, num_classes=CLASSES, **options)
    else:
        import torchvision

        net = torchvision.models.get_model(kind, num_classes=CLASSES, **options)
    fill_zero_heads(net)
    return frozen(net), side


def warm(net: nn.Module, side: int) -> WarmModel:
    """The network as the registry prepares it, for the pictures of `job`."""
    loaded = LoadedModel(
        module=copy.deepcopy(net),
        labels=tuple(map(str, range(CLASSES))),
        num_classes=CLASSES,
        task="single_label",
        preprocess=Preprocess(resize=side, crop=(side, side), mean=(0.5,) * 3, std=(64 / 255,) * 3),
        spec=ModelSpec(name="tiny", source="python:tests:tiny"),
    )
    return warm_up(loaded, torch.device("cpu"), warmup_s=0.0)


def reference(net: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The output of each call of a module, and the target's gradient there, from one pass."""
    outputs: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def hook_of(name: str) -> Callable:
        def hook(_: nn.Module, __: object, output: object) -> object:
            if not isinstance(output, Tensor):
                return None
            calls[name] += 1
            # The bare name stands for the only call.
            outputs[f"{name}#{calls[name]}"] = outputs[name] = output
            return output.clone()  # so that nothing works on it in place

        return hook

    with HookStack() as hooks:
        for name, module in net.named_modules():
            if name:
                hooks.forward(module, hook_of(name))
        scores = net(images.clone().requires_grad_())
    tensors = [t for t in outputs.values() if t.requires_grad]
    found = torch.autograd.grad(scores[:, TARGET].sum(), tensors, allow_unused=True)
    by_tensor = dict(zip(map(id, tensors), found, strict=True))
    return {name: (t.detach(), by_tensor.get(id(t))) for name, t in outputs.items()}


def explain(number: int, layer: str, side: int) -> Job:
    target = (Target(cls=index(TARGET)),)
    options = {"layers": (layer,), "methods": ("hirescam",), "targets": target}
    return job(layer, seed=number, side=side, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_right_or_refused(name):
    net, side = network(name)
    model = warm(net, side)
    engine = Engine(OneModel(model))
    layers = [item.name for item in model.info.layers if item.spatial]
    assert model.target_layer in layers
    # Two images take turns, so that each is in company. No ReLU of these networks is within rounding
    # of its kink for them, where float32 and float64 may take different sides.
    jobs = [explain(2 + number % 2, layer, side) for number, layer in enumerate(layers)]
    outcomes: list[Outcome | Failure] = []
    for start in range(0, len(jobs), 8):
        outcomes += finish(engine, jobs[start : start + 8])
    exact = net.double()
    expected = [reference(exact, normalised(item).double()) for item in jobs[:2]]
    answered = 0
    for number, (layer, outcome) in enumerate(zip(layers, outcomes, strict=True)):
        if isinstance(outcome, Failure):
            assert layer != model.target_layer, outcome.message
            assert outcome.message
            continue
        output, gradient = expected[number % 2][layer]
        found = outcome.explanations[0].map
        if gradient is None:
            assert not np.any(found), f"{layer} has no gradient"
            continue
        layout = model.layouts[layer]
        products = (to_map(output, layout) * to_map(gradient, layout))[0]
        right = products.sum(0).relu().numpy()
        # What precedes a normalisation cancels in the sum, so the terms are the measure of rounding.
        size = float(products.abs().sum(0).max())
        assert np.abs(found - right).max() <= 2e-4 * size, layer
        answered += 1
    assert answered > len(layers) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_changed_at_a_layer_changes_its_own_image_only(name):
    net, side = network(name)
    model = warm(net, side)
    engine = Engine(OneModel(model))
    usable = [item.name for item in model.info.layers if item.usable and item.output_shape]
    plain = job("plain", "predict", seed=1, side=side)
    alone = finish(engine, [plain])[0]
    for layer in usable[:: max(1, len(usable) // 6)]:
        change = (Intervention(layer=layer, channels=(0,), op="scale", value=3.0),)
        changed = job("changed", "predict", seed=2, side=side, interventions=change)
        found, beside = finish(engine, [changed, plain])
        (by_itself,) = finish(engine, [changed])
        for one, other in ((beside, alone), (found, by_itself)):
            if isinstance(other, Failure):
                assert isinstance(one, Failure)
                continue
            scores = [
                [p.score for p in sorted(o.predictions, key=lambda p: p.class_id)]
                for o in (one, other)
            ]
            np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)
