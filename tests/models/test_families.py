"""Every layer of a small network of each family: right to float64 autograd, or refused."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.catalog import ModelSpec
from models.engine import Engine
from models.extractor import Extractor, Tap
from models.hooks import HookStack
from models.layers import to_map
from models.sources import LoadedModel
from models.types import Failure, Intervention, Job, Outcome, Preprocess, Target
from models.warm_model import WarmModel
from models.warmup import warm_up
from tests.models.conftest import OneModel
from tests.models.families import CLASSES, FAMILIES, network
from tests.models.test_engine import finish, index, job, normalised

pytestmark = pytest.mark.slow

TARGET = 3
SEEDS = (2, 3)
"""Of two images: no ReLU of these networks is within rounding of its kink for them, where float32
and float64 may take different sides."""


@dataclass(frozen=True, eq=False)
class Family:
    """A family's network, and it as the registry prepares it for the images of `job`."""

    side: int
    net: nn.Module
    warm: WarmModel
    engine: Engine

    def layers(self, *, spatial: bool) -> list[str]:
        infos = self.warm.info.layers
        return [i.name for i in infos if i.usable and i.output_shape and i.spatial >= spatial]

    def run(self, *jobs: Job) -> list[Outcome | Failure]:
        return finish(self.engine, list(jobs))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Family:
    side, net = FAMILIES[request.param][0], network(request.param)
    loaded = LoadedModel(
        module=copy.deepcopy(net),
        labels=tuple(map(str, range(CLASSES))),
        num_classes=CLASSES,
        task="single_label",
        preprocess=Preprocess(resize=side, crop=(side, side), mean=(0.5,) * 3, std=(64 / 255,) * 3),
        spec=ModelSpec(name="tiny", source="python:tests:tiny"),
    )
    warm = warm_up(loaded, torch.device("cpu"), warmup_s=0.0)
    return Family(side, net, warm, Engine(OneModel(warm)))


@dataclass(frozen=True, eq=False)
class Exact:
    """The output of each call of a module by name, and the target's gradient there."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def exact(net: nn.Module, image: Tensor) -> Exact:
    """By float64 autograd, in one pass."""
    net, outputs, calls = copy.deepcopy(net).double(), {}, Counter()

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
        scores = net(image.double().requires_grad_())
    names = [name for name, output in outputs.items() if output.requires_grad]
    tensors = [outputs[name] for name in names]
    gradients = torch.autograd.grad(scores[0, TARGET], tensors, allow_unused=True)
    return Exact(
        {n: o.detach() for n, o in outputs.items()}, dict(zip(names, gradients, strict=True))
    )


@pytest.fixture(scope="module")
def right(family) -> list[Exact]:
    """What is right for each of the two images."""
    items = [job("", seed=seed, side=family.side) for seed in SEEDS]
    return [exact(family.net, normalised(item)) for item in items]


def asked(family: Family, operation: str, layers: Sequence[str], **options) -> list[Job]:
    """The same question about each of the two images."""
    options |= {"layers": tuple(layers), "targets": (Target(cls=index(TARGET)),)}
    return [job(f"{seed}", operation, seed=seed, side=family.side, **options) for seed in SEEDS]


def some(layers: Sequence[str], count: int = 6) -> list[str]:
    """Some layers spread over the depth, the last among them."""
    return list(layers[:: -max(1, len(layers) // count)])


def check_maps(family: Family, outcome: Outcome, expected: Exact) -> None:
    for explanation in outcome.explanations:
        layer, gradient = explanation.layer, expected.gradients.get(explanation.layer)
        if gradient is None:
            assert not np.any(explanation.map), f"{layer} has no gradient"
            continue
        layout = family.warm.layouts[layer]
        products = to_map(expected.outputs[layer] * gradient, layout)[0]
        # What precedes a normalisation cancels in the sum, so the terms are the measure.
        size = float(products.abs().sum(0).max())
        error = np.abs(explanation.map - products.sum(0).relu().numpy()).max()
        assert error <= 1e-4 * size, layer


def test_every_map_is_right(family, right):
    """At all layers in one pass of the plain network, and at those of its fused twin in one."""
    layers = family.layers(spatial=True)
    assert family.warm.target_layer in layers
    assert len(layers) > len(family.warm.info.layers) / 4
    parts = [layers]
    parts += [[x for x in layers if x in v.rewritable] for v in family.warm.variants]
    for part in parts:
        outcomes = family.run(*asked(family, "explain", part, methods=("hirescam",)))
        for outcome, expected in zip(outcomes, right, strict=True):
            assert len(outcome.explanations) == len(part)
            check_maps(family, outcome, expected)


def test_a_map_alone_is_the_map_in_company(family, right):
    for layer in some(family.layers(spatial=True)):
        (outcome,) = family.run(asked(family, "explain", [layer], methods=("hirescam",))[0])
        check_maps(family, outcome, right[0])


def test_every_layer_is_described_right(family, right):
    layers, kinds = family.layers(spatial=False), ("output", "grad_output")
    outcomes = family.run(*asked(family, "features", layers, kinds=kinds))
    for outcome, expected in zip(outcomes, right, strict=True):
        found = {(s.layer, s.kind): s for s in outcome.statistics}
        for layer in layers:
            tensors = {"output": expected.outputs[layer]}
            if (gradient := expected.gradients.get(layer)) is not None:
                tensors["grad_output"] = gradient
            for kind, tensor in tensors.items():
                statistics, peak = found[layer, kind], float(tensor.abs().max())
                numbers = [statistics.mean, statistics.min, statistics.max]
                wanted = [float(n) for n in (tensor.mean(), tensor.min(), tensor.max())]
                assert numbers == pytest.approx(wanted, abs=1e-4 * peak + 1e-12), (layer, kind)
                assert statistics.l2 == pytest.approx(float(tensor.norm()), rel=1e-4, abs=1e-9)


def test_what_is_changed_at_a_layer_changes_its_own_image_only(family):
    plain = job("plain", "predict", seed=1, side=family.side)
    (alone,) = family.run(plain)
    for layer in some(family.layers(spatial=False)):
        change = (Intervention(layer=layer, channels=(0,), op="scale", value=3.0),)
        changed = job("changed", "predict", seed=2, side=family.side, interventions=change)
        found, beside = family.run(changed, plain)
        (by_itself,) = family.run(changed)
        for pair in ((beside, alone), (found, by_itself)):
            by_class = [sorted(o.predictions, key=lambda p: p.class_id) for o in pair]
            scores = [[p.score for p in predictions] for predictions in by_class]
            np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)


PLACES = ((0.05, 0.55), (0.6, 0.1), (0.3, 0.7), (0.7, 0.4))
"""Corners of the patches, as shares of the side."""
SIZE = 0.25
"""Side of a patch, as a share of the image's."""
ACROSS_A_WINDOW = ("layers.1.blocks.0.drop_path1",)
"""Attention within windows of half the map, by random weights: one patch is felt beside itself."""


def planted(side: int, *, images: int = 16) -> Tensor:
    """Images (N, 5, 3, side, side), each without and with a patch at each of the places."""
    generator = torch.Generator().manual_seed(4)
    made = 0.3 * torch.randn(images, 1, 3, side, side, generator=generator)
    made = made.repeat(1, 1 + len(PLACES), 1, 1, 1)
    size = round(SIZE * side)
    for i, (top, left) in enumerate(PLACES, 1):
        y, x = round(top * side), round(left * side)
        content = 2 * torch.randn(images, 3, size, size, generator=generator)
        made[:, i, :, y : y + size, x : x + size] = content
    return made


def on_patch(peak: int, corner: float, positions: int) -> bool:
    """Whether a position lies on a patch, or next to it.

    Strides put the centre of what a position sees up to half a position off its own.
    """
    beside = 1 if positions >= 4 else 0.5
    low, high = (peak - beside) / positions, (peak + 1 + beside) / positions
    return low < corner + SIZE and corner < high


def test_a_planted_patch_is_felt_where_it_is(family):
    """What patches change at a layer peaks on each of them, at every layer that is a map."""
    images = planted(family.side)
    layers = family.layers(spatial=True)
    with Extractor(family.net, [Tap(layer, "output") for layer in layers]) as extractor:
        extractor.forward(images.flatten(0, 1))
        outputs = {layer: extractor.caught(layer, "output") for layer in layers}
    for layer, output in outputs.items():
        maps = to_map(output, family.warm.layouts[layer]).unflatten(0, images.shape[:2])
        felt = (maps[:, 1:] - maps[:, :1]).square().sum((0, 2))
        if not bool(felt.any()):
            continue  # a branch whose weights begin at zero
        # Attention is felt everywhere: what counts is where this patch is felt more than others.
        mean = felt.mean(0)
        felt = felt.square() / (mean + 1e-12 * mean.mean())
        size = felt.shape[1:]
        peaks = [np.unravel_index(int(response.argmax()), size) for response in felt]
        hits = sum(
            all(map(on_patch, peak, corner, size))
            for peak, corner in zip(peaks, PLACES, strict=True)
        )
        assert hits >= len(PLACES) - (layer in ACROSS_A_WINDOW), (layer, peaks)
