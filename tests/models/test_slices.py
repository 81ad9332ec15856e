"""A job whose first pass is too long is divided where its parts share the least work."""

from __future__ import annotations

import pytest
from msgspec import structs

from models.price import price
from models.slices import slices
from models.types import STEP_MS, ClassRef, JobOptions, ModelInfo, Target
from tests.fakes import LAYERS, fake_info

TARGETS = tuple(Target(cls=ClassRef(kind="index", value=i)) for i in range(6))
FEATURES = JobOptions(targets=TARGETS, layers=LAYERS, kinds=("grad_output",), statistics=True)


def model(latency_ms: float) -> ModelInfo:
    info = fake_info()
    card = structs.replace(info.card, latency_ms={n: n * latency_ms for n in (1, 4)})
    return structs.replace(info, card=card)


@pytest.mark.parametrize("latency_ms", [STEP_MS / 4, 10 * STEP_MS])
def test_targets_are_divided_and_each_passes_through_all_layers_once(latency_ms):
    info = model(latency_ms)
    parts = list(slices("features", FEATURES, info))
    assert price("features", FEATURES, info).long
    assert 1 < len(parts) <= len(TARGETS)
    assert all(part.options.layers == LAYERS for part in parts)
    assert [t for part in parts for t in part.options.targets] == list(TARGETS)
    assert [part.first_target for part in parts] == sorted({p.first_target for p in parts})


def test_one_pass_of_a_slow_model_is_one_part():
    one = structs.replace(FEATURES, targets=TARGETS[:1])
    info = model(10 * STEP_MS)
    assert not price("features", one, info).long
    assert len(list(slices("features", one, info))) == 1
