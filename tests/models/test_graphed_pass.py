"""A recorded pass answers as the plain one does; jobs that do not qualify run plainly."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from models import graphed_pass
from models.capture import Capture
from models.cuda.graphs import Graphs, Work
from models.engine import Engine
from models.graphed_pass import GRAPHABLE, plan_of
from models.methods import METHODS, implementation
from models.registry import ModelRegistry
from models.types import Intervention, Outcome, Target
from models.warm_model import WarmModel
from tests.models.conftest import FlatNet, OneModel, PoolNet, frozen, warm_of
from tests.models.cuda.conftest import graphed, on_gpu, rerun
from tests.models.test_engine import assert_same, finish, index, job, rank
from tests.models.test_extractor import hooks_left
from tests.models.test_registry import NETWORKS, entry

METHODS_HERE = tuple(sorted(GRAPHABLE))


def pooled(seed: int = 1) -> WarmModel:
    torch.manual_seed(seed)
    net = frozen(PoolNet())
    return warm_of(net, linear=net.fc)


class Counting:
    """A recording that does the work again, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Work) -> Work:
        self.recorded += 1

        def replay() -> tuple[torch.Tensor, ...]:
            self.replayed += 1
            return work()

        return replay


def assert_as_plain(warm: WarmModel, batch: list) -> None:
    plain = finish(Engine(OneModel(replace(warm, graphs=None))), batch)
    found = finish(Engine(OneModel(warm)), batch)
    for a, b in zip(found, plain, strict=True):
        assert isinstance(a, Outcome), a
        assert_same(a, b)


classes = st.one_of(st.integers(0, 4).map(index), st.integers(1, 5).map(rank))
targets = st.lists(classes.map(lambda ref: Target(cls=ref)), min_size=1, max_size=3).map(tuple)
explained = st.fixed_dictionaries(
    {
        "operation": st.just("explain"),
        "methods": st.lists(st.sampled_from(METHODS_HERE), min_size=1, max_size=3, unique=True).map(
            tuple
        ),
        "targets": targets,
        "top_k": st.integers(1, 5),
    }
)
predicted = st.fixed_dictionaries(
    {"operation": st.just("predict"), "targets": targets, "top_k": st.integers(1, 5)}
)


@settings(max_examples=50)
@given(st.lists(st.one_of(explained, predicted), min_size=1, max_size=8))
def test_any_batch_is_answered_as_by_the_plain_pass(wanted):
    counting = Counting()
    batch = [job(f"{i}", seed=i, **options) for i, options in enumerate(wanted)]
    assert_as_plain(graphed(pooled(), record=counting), batch)
    assert counting.recorded == counting.replayed == 1


@pytest.mark.parametrize("size", range(1, 9))
def test_padding_never_leaks(size):
    """The same recording serves larger and smaller batches, whose pictures stay in its memory."""
    warm = graphed(pooled())
    bucket = 1 << (size - 1).bit_length()
    for count in (bucket, size, bucket, size):
        batch = [job(f"{i}", seed=100 * count + i, methods=METHODS_HERE) for i in range(count)]
        assert_as_plain(warm, batch)
    assert len(warm.graphs) == 1


def test_ties_go_to_the_lower_index():
    warm = pooled()
    warm.module.fc.weight[:] = warm.module.fc.weight[0]
    warm.module.fc.bias[:] = 0
    batch = [job("a", targets=tuple(Target(cls=rank(r)) for r in range(1, 6)), top_k=5)]
    found = finish(Engine(OneModel(graphed(warm))), batch)[0]
    assert [p.class_id for p in found.predictions] == [0, 1, 2, 3, 4]
    assert [e.target.class_id for e in found.explanations] == [0, 1, 2, 3, 4]


def test_a_signed_layer_is_warned_of():
    warm = replace(pooled(), target_layer="body")
    batch = [job("a", layers=("body",), methods=("gradcam", "xgradcam")), job("b", "predict")]
    assert_as_plain(graphed(warm), batch)
    plain, warned = finish(Engine(OneModel(graphed(warm))), batch)[0].explanations
    assert plain.warnings == ()
    assert "negative" in warned.warnings[0]


CHANGE = Intervention(layer="out", channels=(0,), op="zero")
CONTRAST = Target(cls=rank(1), against=(rank(2),))


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ("eigencam",)},
        {"methods": ("occlusion",), "steps": 2},
        {"layers": ("body",)},
        {"layers": ("body", "out")},
        {"targets": (CONTRAST,)},
        {"statistics": True},
        {"interventions": (CHANGE,)},
        {"faithfulness": ("deletion",)},
        {"operation": "features", "layers": ("out",)},
        {"operation": "predict", "interventions": (CHANGE,)},
    ],
    ids=str,
)
def test_other_batches_run_plainly(options):
    counting = Counting()
    batch = [job("a", "predict"), job("b", **options)]
    assert_as_plain(graphed(pooled(), record=counting), batch)
    assert counting.recorded == 0


def test_batches_beyond_the_best_run_plainly():
    counting = Counting()
    warm = graphed(pooled(), record=counting, best_batch=3)
    assert_as_plain(warm, [job(f"{i}", seed=i) for i in range(4)])
    assert counting.recorded == 0
    assert_as_plain(warm, [job(f"{i}", seed=i) for i in range(3)])
    assert counting.recorded == 1


def test_a_head_without_a_closed_form_is_recorded_for_predictions_only():
    counting = Counting()
    warm = graphed(warm_of(frozen(FlatNet())), record=counting)
    assert_as_plain(warm, [job("a")])
    assert counting.recorded == 0
    assert_as_plain(warm, [job("a", "predict"), job("b", "predict", seed=1)])
    assert counting.recorded == 1


def test_a_plan_is_the_union_of_what_its_jobs_ask_for():
    two = (Target(cls=rank(1)), Target(cls=index(2)))
    batch = [
        job("a", methods=("layercam", "gradcam")),
        job("b", "predict", targets=two * 2),
        job("c", methods=("gradcam", "cam"), targets=two),
    ]
    plan = plan_of(graphed(pooled()), batch)
    assert plan == graphed_pass.Plan(methods=("cam", "gradcam", "layercam"), targets=2, rows=4)


def test_a_device_that_cannot_record_answers_all_the_same():
    def failing(work: Work) -> Work:
        raise RuntimeError("no")

    warm = graphed(pooled(), record=failing)
    for _ in range(3):
        assert_as_plain(warm, [job("a"), job("b", "predict", seed=1)])
    assert len(warm.graphs) == 0


def test_the_model_keeps_no_hook():
    warm = graphed(pooled())
    assert_as_plain(warm, [job("a")])
    assert len(warm.graphs) == 1
    assert hooks_left(warm.module) == 0


class Watching(TorchDispatchMode):
    """Notes decompositions, and operations that mix tensors of two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []
        self.decompositions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
        devices = {leaf.device.type for leaf in flat if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            self.mixed.append(str(func))
        if "linalg_eigh" in str(func) or "svd" in str(func):
            self.decompositions.append(str(func))
        return result


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.cost in ("pass", "head")])
def test_one_pass_methods_only_queue_work_unless_they_decompose(name):
    """On the meta device nothing can be read: methods that need a value, or its shape, fail."""
    capture = Capture(
        "out",
        torch.rand(2, 6, 4, 4, device="meta"),
        torch.rand(2, 3, 6, 1, 1, device="meta"),
        torch.rand(2, 3, device="meta"),
    )
    with Watching() as watching:
        maps = implementation(name)(capture)
    assert maps.shape == (2, 3, 4, 4)
    assert not watching.mixed
    assert (name in GRAPHABLE) == (not watching.decompositions)


@pytest.mark.parametrize("methods", [(), METHODS_HERE], ids=["predict", "explain"])
def test_a_recorded_pass_never_waits_for_the_device(methods):
    meta = torch.device("meta")
    plain = pooled()
    warm = replace(
        plain,
        device=meta,
        module=copy.deepcopy(plain.module).to(meta),
        scale=plain.scale.to(meta),
        shift=plain.shift.to(meta),
        head=plain.head.to(meta),
    )
    run = graphed_pass._pass(
        warm, warm.module, graphed_pass.Plan(methods=methods, targets=3, rows=4)
    )
    pictures = torch.zeros(4, 8, 8, 3, dtype=torch.uint8, device=meta)
    codes = torch.zeros(4, 3, dtype=torch.int64, device=meta)
    with Watching() as watching:
        outputs = run(pictures, codes)
    assert len(outputs) == (6 + len(methods) if methods else 4)
    assert not watching.mixed


@pytest.fixture
def registry(tmp_path, monkeypatch) -> ModelRegistry:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "registry_networks", raising=False)
    (tmp_path / "registry_networks.py").write_text(NETWORKS)
    return ModelRegistry("cpu", tmp_path, warmup_s=0.01)


@pytest.mark.parametrize("on", [True, False])
def test_the_card_says_whether_passes_are_recorded(on, registry, monkeypatch):
    monkeypatch.setattr("models.warmup._graphs", lambda device, dtype: Graphs(rerun, dtype=dtype))
    card = registry.load(entry("pooled", cuda_graphs=on)).card
    assert ("CUDA graphs" in card.preparation) == on
    assert (registry.get("pooled", "1").graphs is not None) == on


def test_a_cpu_records_nothing(registry):
    assert "CUDA graphs" not in registry.load(entry("pooled")).card.preparation
    warm = registry.get("pooled", "1")
    assert warm.graphs is None
    assert warm.uploads is None


@pytest.mark.gpu
def test_a_gpu_answers_as_the_cpu_does(cuda):
    """Recorded, in changing company and through one memory pool."""
    plain = pooled()
    engine = Engine(OneModel(on_gpu(plain, cuda)))
    ranks = tuple(Target(cls=rank(r)) for r in (1, 3))
    for size in (1, 3, 8, 3, 1, 2):
        for options in ({}, {"methods": METHODS_HERE}, {"targets": ranks}):
            batch = [job(f"{i}", seed=10 * size + i, **options) for i in range(size)]
            batch[-1] = job("last", "predict", seed=size)
            expected = finish(Engine(OneModel(plain)), batch)
            for a, b in zip(finish(engine, batch), expected, strict=True):
                assert_same(a, b, rtol=5e-3, atol=5e-3)
    assert len(engine._registry.warm.graphs) > 0


@pytest.mark.gpu
def test_every_method_of_one_pass_can_be_recorded(cuda):
    warm = on_gpu(pooled(), cuda)
    finish(Engine(OneModel(warm)), [job("a", methods=METHODS_HERE)])
    assert len(warm.graphs) == 1
