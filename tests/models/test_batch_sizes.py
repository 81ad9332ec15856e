"""Networks that take batches of one size only are explained as those that take any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.engine import Engine
from models.methods import METHODS
from models.network_proof import prove_network
from models.proof import ONE_AT_A_TIME
from models.types import Failure, Intervention, Preprocess, Target
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


@pytest.fixture(scope="module")
def squeezing() -> WarmModel:
    return served(Squeezing)


CHANGE = (Intervention(layer="act", channels=(1,), op="scale", value=3.0),)
TARGETS = (Target(cls=index(1)), Target(cls=index(3)))


def test_every_method_explains_a_squeezing_network_as_another(plain, squeezing):
    applicable = [row.name for row in squeezing.info.card.methods if row.applicable]
    assert applicable == [row.name for row in plain.info.card.methods if row.applicable]
    many = {name for name in applicable if METHODS[name].cost == "many"}
    jobs = [
        job(name, seed=i, methods=(name,), targets=TARGETS, samples=4 if name in many else None)
        for i, name in enumerate(applicable)
    ]
    for one in jobs:
        found, expected = (finish(Engine(OneModel(m)), [one])[0] for m in (squeezing, plain))
        assert_same(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["input", "output", "grad_input", "grad_output"])
def test_layers_of_a_lone_image_are_described_and_changed(plain, squeezing, kind):
    options = {"layers": ("act", "body"), "kinds": (kind,), "targets": TARGETS[:1]}
    jobs = [job("a", "features", **options), job("b", interventions=CHANGE, targets=TARGETS)]
    for one in jobs:
        found, expected = (finish(Engine(OneModel(m)), [one])[0] for m in (squeezing, plain))
        assert_same(found, expected, rtol=1e-3, atol=1e-5)


def test_of_a_network_for_single_images_the_input_is_explained(plain):
    model = served(Flattening)
    assert {layer.reason for layer in model.info.layers} == {ONE_AT_A_TIME}
    rows = {row.name: row for row in model.info.card.methods}
    assert "one image at a time" in rows["gradcam"].reason
    names = ("saliency", "integrated_gradients", "occlusion")
    jobs = [job(name, seed=i, methods=(name,), layers=()) for i, name in enumerate(names)]
    found = finish(Engine(OneModel(model)), jobs)
    expected = finish(Engine(OneModel(plain)), jobs)
    assert not any(isinstance(one, Failure) for one in found)
    assert_same(found, expected, rtol=1e-3, atol=1e-5)
