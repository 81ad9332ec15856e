"""Networks that take batches of one size only are explained as those that take any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.engine import Engine
from models.methods import METHODS
from models.network_proof import prove_network
from models.proof import NOT_THE_IMAGE
from models.types import Intervention, Job, Outcome, Preprocess, Target
from models.warm_model import WarmModel
from tests.models.conftest import OneModel, PoolNet, frozen
from tests.models.preparation.conftest import SIDE, warm
from tests.models.test_engine import assert_same, finish, index, job


class Squeezing(PoolNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.out(self.body(self.act(self.stem(x))))).squeeze())


class Flattening(PoolNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.out(self.body(self.act(self.stem(x)))))))


def served(kind: type[PoolNet]) -> WarmModel:
    torch.manual_seed(2)
    preprocess = Preprocess(resize=SIDE, crop=(SIDE, SIDE))
    return warm(prove_network(frozen(kind()), preprocess, "single_label").module)


@pytest.fixture(scope="module")
def plain() -> WarmModel:
    return served(PoolNet)


@pytest.fixture(scope="module", params=[Squeezing, Flattening])
def fixed(request) -> WarmModel:
    """One that fails on a single image, and one that fails on any other batch."""
    return served(request.param)


CHANGE = (Intervention(layer="act", channels=(1,), op="scale", value=3.0),)
TARGETS = (Target(cls=index(1)), Target(cls=index(3)))


def applicable(model: WarmModel) -> list[str]:
    return [row.name for row in model.info.card.methods if row.applicable]


def same(model: WarmModel, plain: WarmModel, jobs: list[Job]) -> None:
    """Both answer a batch of jobs alike."""
    found, expected = (finish(Engine(OneModel(m)), jobs) for m in (model, plain))
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Outcome), one
        assert_same(one, other, rtol=1e-3, atol=1e-5)


def test_every_method_explains_it_as_another(plain, fixed):
    names = applicable(fixed)
    # That a head is linear is proved in one batch, and the classifier's bias is no image's.
    refused = {"cam", "fullgrad"} if fixed.largest_batch == 1 else set()
    assert names == [name for name in applicable(plain) if name not in refused]
    many = {name for name in names if METHODS[name].cost == "many"}
    jobs = [
        job(name, seed=i, methods=(name,), targets=TARGETS, samples=4 if name in many else None)
        for i, name in enumerate(names)
    ]
    for one in jobs:
        same(fixed, plain, [one])
    # Passes and steps of all of them at once.
    same(fixed, plain, jobs)
    measured = ("deletion", "average_drop", "road")
    same(fixed, plain, [job("a", faithfulness=measured, methods=("gradcam",), targets=TARGETS)])


@pytest.mark.parametrize("kind", ["input", "output", "grad_input", "grad_output"])
def test_layers_of_a_lone_image_are_described_and_changed(plain, fixed, kind):
    options = {"layers": ("act", "body"), "kinds": (kind,), "targets": TARGETS[:1]}
    jobs = [job("a", "features", **options), job("b", interventions=CHANGE, targets=TARGETS)]
    for one in jobs:
        same(fixed, plain, [one])


def test_of_a_network_for_single_images_layers_without_the_image_are_not_used():
    model = served(Flattening)
    layers = {layer.name: layer for layer in model.info.layers}
    assert layers["out"].spatial
    assert not layers["fc"].usable
    assert layers["fc"].reason == NOT_THE_IMAGE
    assert (model.info.card.best_batch, model.chunk) == (1, 1)
