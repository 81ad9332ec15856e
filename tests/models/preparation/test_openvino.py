"""A model on OpenVINO answers as on torch, or is served by torch and its card says why."""

from __future__ import annotations

import gc
import logging
import math
import os
import subprocess
import sys
import threading
import weakref
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import nn

from models.catalog import default_spec
from models.engine import Engine
from models.errors import ModelLoadFailed
from models.head import HeadProbe
from models.preparation import openvino
from models.preparation.optimise import Findings, optimise
from models.preparation.replay import Replay
from models.preparation.variant import Needs, layer_outputs
from models.reductions import SUBSAMPLE
from models.registry import ModelRegistry
from models.types import Intervention, Outcome, Target
from models.warm_model import WarmModel
from tests.models.conftest import FlatNet, OneModel, PoolNet, frozen
from tests.models.preparation.conftest import SIDE, blocks, warm
from tests.models.test_engine import MIXED, assert_same, finish, index, job

pytestmark = pytest.mark.skipif(
    not openvino.installed(), reason="OpenVINO is not installed (extra: openvino)"
)

ROOT = Path(__file__).parents[3]
FEATURES = ("block", "act", "out")


def change(layer: str) -> tuple[Intervention, ...]:
    return (Intervention(layer=layer, channels=(0, 2), op="scale", value=-2.0),)


JOBS = [
    *MIXED,
    job("inner", seed=11, layers=FEATURES, statistics=True, targets=(Target(cls=index(3)),)),
    job("described", "features", seed=12, layers=("block", "out"), grid=True),
    job("inputs", "features", seed=13, layers=("out",), kinds=("input",)),
    job("inner gradients", "features", seed=14, layers=("block",), kinds=("grad_output",)),
    job("changed there", seed=15, interventions=change("out"), methods=("gradcam", "scorecam")),
    job("changed before", seed=16, interventions=change("block"), statistics=True),
    job("masked too", seed=16, interventions=change("block"), methods=("scorecam",)),
    job("changed and read", "features", seed=17, layers=("out",), interventions=change("block")),
    job("tested", seed=18, faithfulness=("deletion", "average_drop")),
]


def module_of(model: WarmModel, needs: Needs) -> type[nn.Module]:
    return type(model.module_for(needs))


def assert_equal_answers(jobs, *models: WarmModel, atol: float = 1e-4) -> None:
    expected, found = (finish(Engine(OneModel(model)), jobs) for model in models)
    for one, other in zip(expected, found, strict=True):
        assert isinstance(one, Outcome), one
        assert_same(sampled_apart(other), sampled_apart(one), rtol=1e-3, atol=atol)


def sampled_apart(outcome: Outcome) -> Outcome:
    """The outcome without quantiles of large tensors, whose sample follows the memory layout."""
    statistics = tuple(
        s if math.prod(s.shape) <= SUBSAMPLE else structs.replace(s, quantiles=None)
        for s in outcome.statistics
    )
    return structs.replace(outcome, statistics=statistics)


def skipped(model: WarmModel) -> str:
    assert not any(isinstance(variant.module, Replay) for variant in model.variants)
    return next(s for s in model.info.card.preparation if s.startswith("openvino skipped"))


def test_a_mixed_batch_is_answered_as_on_torch(on_torch, on_openvino):
    assert on_openvino.info.feature_layers == on_torch.info.feature_layers
    assert_equal_answers(JOBS, on_torch, on_openvino)


def test_every_method_explains_as_on_torch(on_torch, on_openvino):
    names = [row.name for row in on_openvino.info.card.methods if row.applicable]
    assert {"guided_gradcam", "fullgrad", "lrp", "smoothgrad", "shapleycam"} <= set(names)
    jobs = [job(n, seed=i, methods=(n,), samples=4, steps=4) for i, n in enumerate(names)]
    assert_equal_answers(jobs, on_torch, on_openvino)


def test_batches_of_any_size(on_torch, on_openvino):
    for size in (1, 5, 16, 2):
        jobs = [job(str(i), seed=i) for i in range(size)]
        assert_equal_answers(jobs, on_torch, on_openvino)


def backbone(model):
    """What computes the plain passes of a model."""
    return model.variants[0].module._run


def unused(*_: object) -> None:
    raise AssertionError("there is a faster graph")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_whole_rounds_of_a_batch_are_run_by_a_graph_for_single_images(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    run = backbone(warm(blocks(), runtime="openvino"))
    images = torch.randn(11, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    any_size = run._of_any_size.result()
    expected = any_size(images)[0]
    run(images[:threads]), run(images[:1])
    sizes = [threads, 2 * threads, 2 * threads + 1, 1]
    monkeypatch.setattr(any_size, "run", unused)
    for size in sizes:
        torch.testing.assert_close(run(images[:size])[0], expected[:size], rtol=1e-4, atol=1e-5)
    if threads == 3:
        with pytest.raises(AssertionError, match="faster graph"):
            run(images[:5])


def test_images_that_run_at_the_same_time_keep_their_order():
    run = backbone(warm(blocks(), runtime="openvino"))
    images = torch.randn(16, 3, SIDE, SIDE)
    alone = torch.cat([run(image[None])[0] for image in images])
    for _ in range(20):
        torch.testing.assert_close(run(images)[0], alone, rtol=1e-4, atol=1e-5)


def test_a_graph_that_gives_other_tensors_is_not_used(monkeypatch):
    monkeypatch.setattr(openvino, "close", lambda *_: False)
    run = backbone(warm(blocks(), runtime="openvino"))
    images = torch.randn(4, 3, SIDE, SIDE)
    run(images), run(images[:1])
    assert set(run._single.values()) == {run._of_any_size.result()}


def test_after_the_first_start_no_batch_waits_for_its_graph(tmp_path, monkeypatch):
    warm(blocks(), runtime="openvino", proofs_dir=tmp_path)
    release, make = threading.Event(), openvino._Graph

    def slowly(*args, batch, **kwargs):
        assert batch == -1 or release.wait(timeout=60)
        return make(*args, batch=batch, **kwargs)

    monkeypatch.setattr(openvino, "_Graph", slowly)
    run = backbone(warm(blocks(), runtime="openvino", proofs_dir=tmp_path))
    images = torch.randn(torch.get_num_threads(), 3, SIDE, SIDE)
    expected = run(images)[0]
    release.set()
    futures.wait([begun for begun in run._single.values() if begun], timeout=60)
    run(images)
    monkeypatch.setattr(run._of_any_size.result(), "run", unused)
    torch.testing.assert_close(run(images)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_request_that_fails_does_not_leave_others_running(monkeypatch):
    run = backbone(warm(blocks(), runtime="openvino"))
    images = torch.randn(4, 3, SIDE, SIDE)
    run(images)
    graph = run._single[run._at_a_time]
    ended = []

    class Failing:
        def __getattr__(self, _: str):
            return lambda *_: None

        def wait(self) -> None:
            ended.append(self)
            raise RuntimeError("no memory left")

    monkeypatch.setattr(graph, "_requests", [Failing() for _ in images])
    with pytest.raises(RuntimeError, match="no memory left"):
        run(images)
    assert len(ended) == len(images)


def test_where_a_graph_is_not_compiled_the_next_variant_serves(tmp_path, monkeypatch):
    """What was proved at an earlier start is compiled while the model serves, and may fail then."""
    inner = Needs(reads=frozenset({"block"}))
    model = warm(blocks(), runtime="openvino", proofs_dir=tmp_path)
    assert module_of(model, inner) is Replay
    make = openvino._Graph

    def failing(*args, outputs, **kwargs):
        if outputs > 1:
            raise RuntimeError("no memory left")
        return make(*args, outputs=outputs, **kwargs)

    monkeypatch.setattr(openvino, "_Graph", failing)
    model = warm(blocks(), runtime="openvino", proofs_dir=tmp_path)
    assert module_of(model, Needs()) is Replay
    assert module_of(model, inner) is not Replay
    described = job("a", "features", layers=("block",))
    assert_equal_answers([described], warm(blocks(), runtime="torch"), model)


def test_a_model_that_is_dropped_leaves_no_graph(tmp_path):
    for _ in range(2):
        model = warm(blocks(), runtime="openvino", proofs_dir=tmp_path)
        run = backbone(model)
        run(torch.randn(3, 3, SIDE, SIDE))
        graphs = [
            weakref.ref(begun) for begun in (run._of_any_size, *run._single.values()) if begun
        ]
        assert len(graphs) > 1
        # What is compiled at the time holds itself.
        run._compiler._thread.shutdown()
        del model, run
        gc.collect()
        assert not any(graph() for graph in graphs)


@pytest.mark.parametrize(("room", "graphs"), [(0, 0), (1, 1), (2, 2)])
def test_large_networks_have_few_graphs(monkeypatch, room, graphs):
    weights = sum(p.nbytes for p in blocks().parameters())
    monkeypatch.setattr(openvino, "SINGLE_BYTES", room * weights)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run = backbone(warm(blocks(), runtime="openvino"))
    images = torch.randn(3, 3, SIDE, SIDE)
    alone = torch.cat([run(image[None])[0] for image in images])
    torch.testing.assert_close(run(images)[0], alone, rtol=1e-4, atol=1e-5)
    assert len(run._single) == graphs


def test_threads_do_not_share_images_where_there_is_room_for_one_more_graph(monkeypatch):
    weights = sum(p.nbytes for p in blocks().parameters())
    monkeypatch.setattr(openvino, "SINGLE_BYTES", weights)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run = backbone(warm(blocks(), runtime="openvino"))
    images = torch.randn(5, 3, SIDE, SIDE)
    run(images[:1]), run(images[:1])
    graph = run._of_any_size.result()
    assert int(graph._compiled.get_property("NUM_STREAMS")) == 2
    ran, sizes = graph.run, []

    def spied(images, outputs) -> None:
        sizes.append(len(images))
        ran(images, outputs)

    monkeypatch.setattr(graph, "run", spied)
    run(images)
    # What is left over has both threads together, in the other graph.
    assert sizes == [4]


def test_passes_run_where_they_can(on_openvino):
    out, inner = frozenset({"out"}), frozenset({"block"})
    assert module_of(on_openvino, Needs()) is Replay
    assert module_of(on_openvino, Needs(reads=out, rewrites=out)) is Replay
    assert module_of(on_openvino, Needs(reads=inner, rewrites=out)) is Replay
    for beyond in (
        Needs(rewrites=inner),
        Needs(input_gradient=True),
        Needs(layer_inputs=True),
        Needs(reads=frozenset({"body"})),
    ):
        assert module_of(on_openvino, beyond) is not Replay
    # Layers beside the target cost something, which passes without them do not pay.
    lean, wide = on_openvino.variants[:2]
    assert lean.readable == out
    assert wide.readable == {*on_openvino.info.feature_layers, "out"}


def test_long_methods_run_on_the_runtime(on_openvino):
    engine = Engine(OneModel(on_openvino))
    for asked in ({"methods": ("scorecam",)}, {"methods": ("rise",)}, {"faithfulness": ("road",)}):
        (pending,) = engine.run([job("long", samples=4, **asked)])
        assert isinstance(pending.module, Replay), asked
    (pending,) = engine.run([job("long", methods=("saliency",))])
    assert not isinstance(pending.module, Replay)


def test_an_explanation_checks_and_copies_nothing_that_the_head_makes_itself(
    on_openvino, monkeypatch
):
    """Its scores are its head's by construction, and nothing works in place behind its layers."""

    def unneeded(*_: object, **__: object) -> None:
        raise AssertionError("done twice")

    expected = finish(Engine(OneModel(on_openvino)), [job("a"), job("b", "predict")])
    monkeypatch.setattr(HeadProbe, "reproduces", unneeded)
    monkeypatch.setattr(torch.Tensor, "clone", unneeded)
    found = finish(Engine(OneModel(on_openvino)), [job("a"), job("b", "predict")])
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def test_what_a_pass_gave_outlives_the_next_one(on_openvino):
    module = on_openvino.variants[1].module
    run = module._run
    first, second = torch.randn(2, 2, 3, SIDE, SIDE)
    kept = run(first)
    before = [t.clone() for t in kept]
    run(second)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@pytest.mark.real
def test_the_default_model_answers_as_on_torch(tmp_path):
    registry = ModelRegistry("cpu", tmp_path, warmup_s=0.01)
    spec = default_spec()
    for version, runtime in (("1", "torch"), ("2", "openvino")):
        registry.load(spec.model_copy(update={"version": version, "runtime": runtime}))
    models = [registry.get(spec.name, version) for version in "12"]
    card = models[1].info.card
    assert "OpenVINO trunk in fp32" in card.preparation
    layers = (models[1].info.feature_layers[0], card.target_layer)
    jobs = [
        job("predict", "predict", seed=1, side=224),
        job("explain", seed=2, side=224, layers=layers[1:]),
        job("described", "features", seed=3, side=224, layers=layers),
    ]
    assert_equal_answers(jobs, *models)


class ChannelsLast(PoolNet):
    """A network whose last map is (N, h, w, C), as that of a Swin transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.body(self.act(self.stem(x))).permute(0, 2, 3, 1)
        return self.fc(self.out(maps).mean((1, 2)))


@pytest.mark.parametrize(
    ("net", "task", "classes"),
    [
        (blocks(outputs=1), "binary", 2),
        (blocks(outputs=2), "single_label", 2),
        (blocks(outputs=3), "multi_label", 3),
        (frozen(ChannelsLast()), "single_label", 5),
    ],
)
def test_heads_of_every_task(net, task, classes):
    model = warm(net, task=task, classes=classes, runtime="openvino")
    pictures = torch.randn(3, 3, SIDE, SIDE)
    replay = model.module_for(Needs())
    assert isinstance(replay, Replay), model.info.card.preparation
    with torch.inference_mode():
        torch.testing.assert_close(replay(pictures), net(pictures), rtol=1e-4, atol=1e-5)


def test_half_precision_is_what_the_cpu_has(every_precision, on_torch):
    model = warm(blocks(), runtime="openvino", precision="bf16")
    card = model.info.card
    assert f"OpenVINO trunk in {card.precision}" in card.preparation
    if card.precision == "fp32":
        assert "fp32 instead of bf16: OpenVINO has no bf16 on this CPU" in card.preparation
        assert model.dtype == torch.float32
    else:
        assert card.precision == "bf16"
    (expected,), (found,) = (
        finish(Engine(OneModel(m)), [job("one", seed=1)]) for m in (on_torch, model)
    )
    np.testing.assert_allclose(
        found.explanations[0].map, expected.explanations[0].map, rtol=0.1, atol=0.05
    )


class Unknown(PoolNet):
    """A network with an operation that OpenVINO has no word for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.special.log_ndtr(x))


class Counting(PoolNet):
    """A network that treats a batch of two, as the probes use, differently from all others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if len(x) == 2 else 2 * x)


class Fixed(PoolNet):
    """A network that, once traced, takes batches of one size only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(int(x.shape[0]), 3, SIDE, SIDE))


class Repeated(PoolNet):
    """A network whose last map is made by a module that made an earlier one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.act(self.body(self.act(self.stem(x))))).flatten(1))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Repeated, "the target layer is one of several calls of a module"),
        (FlatNet, "what follows the target layer is not pooling and one linear layer"),
        (Unknown, "the conversion failed; the log says more"),
        (Fixed, "it fails on a batch of another size; the log says more"),
        (Counting, "its scores differ from torch's"),
    ],
)
def test_models_that_it_cannot_run_are_served_by_torch(net, reason):
    net = frozen(net())
    model = warm(net, runtime="openvino")
    assert skipped(model) == f"openvino skipped: {reason}"
    pictures = torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        torch.testing.assert_close(model.module_for(Needs())(pictures), net(pictures))


def test_without_the_package_it_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelLoadFailed, match=r"pip install 'heatlens\[openvino\]'"):
        warm(blocks(), runtime="openvino")


def test_other_devices_are_served_by_torch(on_torch):
    findings = Findings(
        target_layer="out",
        layout=None,
        head=HeadProbe(kind="gap_linear", closed_form=True, weight=torch.zeros(5, 6)),
        choose_features=lambda _: (),
    )
    net, images = blocks(), torch.randn(2, 3, SIDE, SIDE)
    prepared = optimise(
        net,
        (images, net(images)),
        spec=default_spec().model_copy(update={"runtime": "openvino"}),
        device=torch.device("meta"),
        findings=findings,
    )
    assert "openvino skipped: it is for the CPU" in prepared.steps
    assert next(prepared.module.parameters()).is_meta


def test_a_layer_whose_tensor_differs_is_not_offered(monkeypatch):
    run = openvino.CompiledBackbone.__call__

    def faulty(self, inputs):
        target, *features = run(self, inputs)
        return [target, *(1.01 * feature for feature in features)]

    monkeypatch.setattr(openvino.CompiledBackbone, "__call__", faulty)
    model = warm(blocks(), runtime="openvino")
    assert [t.readable for t in model.variants if isinstance(t.module, Replay)] == [{"out"}] * 2


def test_warnings_are_logged_as_before(caplog):
    before = logging.getLogger().level, logging.getLogger().filters[:]
    warm(blocks(), runtime="openvino")
    assert (logging.getLogger().level, logging.getLogger().filters) == before
    logging.getLogger("heatlens.test").warning("still heard")
    assert "still heard" in caplog.text


def test_the_next_load_reads_what_was_converted(tmp_path, on_torch, monkeypatch):
    warm(blocks(), runtime="openvino", proofs_dir=tmp_path)
    monkeypatch.delattr(openvino, "_convert")
    model = warm(blocks(), runtime="openvino", proofs_dir=tmp_path)
    assert model.variants[1].readable == {*on_torch.info.feature_layers, "out"}
    assert_equal_answers(JOBS, on_torch, model)


def test_a_damaged_file_is_converted_again(tmp_path, on_torch):
    warm(blocks(), runtime="openvino", proofs_dir=tmp_path)
    for file in (*tmp_path.glob("*.xml"), *tmp_path.glob("*.bin")):
        file.write_bytes(file.read_bytes()[:100])
    model = warm(blocks(), runtime="openvino", proofs_dir=tmp_path)
    assert module_of(model, Needs()) is Replay
    assert_equal_answers(JOBS[:1], on_torch, model)


class Nested(PoolNet):
    """A network whose blocks hold blocks, the last of which ends them."""

    def __init__(self) -> None:
        super().__init__(channels=4)
        part = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(nn.Sequential(*part[:2]), nn.Sequential(*part))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.body(self.act(self.stem(x)))).flatten(1))


def test_layers_that_return_the_same_are_computed_once():
    net = frozen(Nested())
    model = warm(net, runtime="openvino")
    wide = next(v for v in model.variants if {"body", "body.1"} <= v.readable)
    assert isinstance(wide.module, Replay)
    pictures = torch.randn(2, 3, SIDE, SIDE)
    tensors = wide.module._run(pictures)
    assert len(tensors) < len(wide.readable)
    found, expected = (layer_outputs(m, pictures, layers=wide.readable) for m in (wide.module, net))
    for layer in wide.readable:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_nothing_is_reported_to_anyone(tmp_path):
    code = (
        "import sys\n"
        "from tests.models.preparation.conftest import blocks, warm\n"
        "model = warm(blocks(), runtime='openvino')\n"
        "assert 'OpenVINO trunk in fp32' in model.info.card.preparation\n"
        "assert not sys.modules.get('openvino_telemetry')\n"
    )
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True, timeout=100)
    # What reports keeps a client's number there.
    assert not (tmp_path / "intel").exists()
