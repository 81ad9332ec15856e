"""What holds for every row of METHODS, on tiny networks of three kinds, through the engine."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from torch import nn

from models.catalog import ModelSpec
from models.compat import define_missing_operators
from models.engine import Engine
from models.methods import METHODS, implementation
from models.sources import LoadedModel
from models.suspended import Suspended
from models.types import ClassRef, Job, JobOptions, Outcome, Preprocess, Target
from models.warm_model import WarmModel
from models.warmup import warm_up
from models.weights import seeded

define_missing_operators()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402  (its operators come first)

SIDE, CLASSES = 16, 5
SHIFTING = {"eigencam", "eigengradcam", "kpca_cam", "fem"}
"""Methods without a final ReLU whose sign has no meaning; below 0 on some layers."""


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, padding=1)
        self.norm, self.act, self.out = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.ReLU()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.out(self.norm(self.body(self.act(self.stem(x))))).mean((2, 3)))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, padding=1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(6 * 16, 12), nn.ReLU(), nn.Linear(12, CLASSES))

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def transformer() -> nn.Module:
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return VisionTransformer(num_classes=CLASSES, **sizes)


MAKERS = {"pooled": Pooled, "flat": Flat, "transformer": transformer}


@cache
def warmed(kind: str, precision: str = "fp32") -> WarmModel:
    with seeded():
        module = MAKERS[kind]()
    loaded = LoadedModel(
        spec=ModelSpec(name="m", source="python:tests:net", weights="none", precision=precision),
        module=module.eval().requires_grad_(False),
        labels=tuple(map(str, range(CLASSES))),
        num_classes=CLASSES,
        task="single_label",
        preprocess=Preprocess(resize=SIDE, crop=(SIDE, SIDE)),
    )
    return warm_up(loaded, torch.device("cpu"), warmup_s=0.0)


def chunked(warm: WarmModel, chunk: int) -> WarmModel:
    card = structs.replace(warm.info.card, best_batch=chunk)
    return replace(warm, info=structs.replace(warm.info, card=card))


def kinds_of(name: str) -> list[str]:
    """Networks that a method can explain."""
    return [
        kind
        for kind in MAKERS
        for row in warmed(kind).info.card.methods
        if row.name == name and row.applicable
    ]


class OneModel:
    def __init__(self, warm: WarmModel) -> None:
        self.warm = warm

    def get(self, name: str, version: str) -> WarmModel:
        return self.warm


def job(warm: WarmModel, names, picture: int, targets=(0,), *, seed: int = 0) -> Job:
    pixels = np.random.default_rng(picture).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Job(
        id=f"{picture}",
        operation="explain",
        model="m",
        version="1",
        input=pixels,
        options=JobOptions(
            methods=tuple(names),
            layers=(warm.target_layer,),
            targets=tuple(Target(cls=ClassRef(kind="index", value=c)) for c in targets),
            samples=5,
            steps=3,
            seed=seed,
        ),
    )


def finish(warm: WarmModel, jobs) -> list[list[np.ndarray]]:
    """Maps of each job; the steps of all jobs are taken together."""
    engine = Engine(OneModel(warm))
    answers = engine.run(jobs)
    while pending := [a for a in answers if isinstance(a, Suspended)]:
        advanced = iter(engine.advance(pending))
        answers = [next(advanced) if isinstance(a, Suspended) else a for a in answers]
    assert all(isinstance(answer, Outcome) for answer in answers), answers
    return [[e.map for e in answer.explanations] for answer in answers]


def assert_same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * max(1e-6, np.abs(b).max()))


PICTURES = st.integers(0, 10_000)
CHOSEN = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=3, unique=True)
every_method = pytest.mark.parametrize("name", list(METHODS))
few = settings(max_examples=3, deadline=None, derandomize=True)


def test_every_method_has_a_network_here() -> None:
    assert all(kinds_of(name) for name in METHODS)


@every_method
def test_the_function_says_what_it_computes_and_where_from(name):
    assert implementation(name).__doc__
    assert METHODS[name].paper
    assert METHODS[name].formula


@every_method
@few
@given(picture=PICTURES, targets=CHOSEN, chunk=st.integers(1, 8))
def test_maps_are_finite_maps_of_their_target(name, picture, targets, chunk):
    for kind in kinds_of(name):
        warm = chunked(warmed(kind), chunk)
        (found,) = finish(warm, [job(warm, [name], picture, targets)])
        assert len(found) == len(targets)
        for values in found:
            assert values.dtype == np.float32
            assert values.ndim == 2
            assert min(values.shape) > 1
            assert np.isfinite(values).all()
            if not METHODS[name].signed and name not in SHIFTING:
                assert values.min() >= 0


@every_method
@few
@given(pictures=st.lists(PICTURES, min_size=2, max_size=3, unique=True), targets=CHOSEN)
def test_a_batch_equals_its_pictures_alone(name, pictures, targets):
    """Each with targets of its own."""
    for kind in kinds_of(name):
        warm = chunked(warmed(kind), 4)
        rows = [targets, targets[:1], [*reversed(targets)]]
        jobs = [job(warm, [name], p, t) for p, t in zip(pictures, rows, strict=False)]
        for found, alone in zip(finish(warm, jobs), jobs, strict=True):
            assert_same(found, finish(warm, [alone])[0])


@every_method
@few
@given(picture=PICTURES, targets=CHOSEN, chunk=st.integers(2, 9))
def test_maps_do_not_depend_on_the_size_of_chunks(name, picture, targets, chunk):
    for kind in kinds_of(name):
        one, other = (chunked(warmed(kind), size) for size in (1, chunk))
        wanted = job(one, [name], picture, targets)
        assert_same(finish(other, [wanted])[0], finish(one, [wanted])[0])


@every_method
@few
@given(picture=PICTURES, seed=st.integers(0, 2**31 - 1))
def test_the_same_seed_gives_the_same_map(name, picture, seed):
    for kind in kinds_of(name):
        warm = chunked(warmed(kind), 3)
        (first,), (again,), (other,) = (
            finish(warm, [job(warm, [name], picture, seed=s)])[0] for s in (seed, seed, seed ^ 1)
        )
        assert np.array_equal(first, again)
        # A linear head leaves nothing to chance.
        exact = name == "smooth_gradcam_plus_plus" and warm.head.closed_form
        drawn = "seed" in METHODS[name].defaults and not exact
        if not drawn:
            assert np.array_equal(first, other)
        elif first.any():
            assert not np.array_equal(first, other)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_the_model_is_left_as_it_was(kind, untouched):
    warm = chunked(warmed(kind), 4)
    names = [row.name for row in warm.info.card.methods if row.applicable]
    with untouched(warm.module):
        together = finish(warm, [job(warm, names, 1, (0, 3))])[0]
    alone = [m for name in names for m in finish(warm, [job(warm, [name], 1, (0, 3))])[0]]
    assert_same(together, alone)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_an_abandoned_method_leaves_nothing(kind, untouched):
    """A job that is given up after any of its steps, as when its client went away."""
    warm = chunked(warmed(kind), 1)
    names = [row.name for row in warm.info.card.methods if row.applicable]
    with untouched(warm.module):
        for name in names:
            engine = Engine(OneModel(warm))
            answer = engine.run([job(warm, [name], 2)])[0]
            for _ in range(2):
                if isinstance(answer, Suspended):
                    answer = engine.advance([answer])[0]
            if isinstance(answer, Suspended):
                answer.close()


@pytest.mark.parametrize("kind", list(MAKERS))
def test_half_precision_answers_alike(kind, every_precision):
    warm, half = (chunked(warmed(kind, precision), 4) for precision in ("fp32", "bf16"))
    assert half.dtype == torch.bfloat16
    names = [row.name for row in half.info.card.methods if row.applicable]
    assert names == [row.name for row in warm.info.card.methods if row.applicable]
    (found,), (expected,) = (finish(m, [job(m, names, 1)]) for m in (half, warm))
    alike = {
        name: np.corrcoef(a.ravel(), b.ravel())[0, 1]
        for name, a, b in zip(names, found, expected, strict=True)
        if np.ptp(a) > 0 and np.ptp(b) > 0
    }
    assert len(alike) > len(names) / 2
    assert np.median(list(alike.values())) > 0.95, alike
