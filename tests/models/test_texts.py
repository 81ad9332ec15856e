"""Labels in requests: scores and maps are those of transformers, alone and in company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image

from models.compat import define_missing_operators
from models.engine import Engine
from models.sources import load
from models.suspended import Suspended
from models.types import ClassRef, Failure, Job, JobOptions, Outcome, Target
from models.warmup import warm_up
from tests.models.conftest import OneModel
from tests.models.sources.clip import LABELS, SIGLIP_TOKENS, saved, spec_of
from tests.models.test_engine import assert_same, finish

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
define_missing_operators()

FEW = ("a cup of a dog", "a photo of a photo")
MORE = ("a coffee", "dog of coffee", "a cat", "photo", "a cup")


class Saved:
    """A folder that is loaded twice: by transformers, and to be served."""

    def __init__(self, folder, kind: str, **fields) -> None:
        self.model, self.tokenizer, self.processor = saved(folder / "saved", kind)
        self.model.eval()
        self.padding = (
            {"padding": "max_length", "max_length": SIGLIP_TOKENS}
            if kind == "siglip"
            else {"padding": True}
        )
        self.warm = warm_up(load(spec_of(**fields), folder), torch.device("cpu"), warmup_s=0.0)
        self.engine = Engine(OneModel(self.warm))


@pytest.fixture(scope="module", params=["clip", "siglip"])
def made(request, tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("made"), request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("clip"), "clip")


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def job(name: str, operation: str = "predict", *, seed: int = 0, **options) -> Job:
    if operation == "explain":
        options = {"methods": ("gradcam",), "layers": (LAYER,), **options}
    return Job(
        id=name,
        operation=operation,
        model="m",
        version="1",
        input=pixels(seed),
        options=JobOptions(**options),
    )


LAYER = "vision_model.encoder.layers.1.layer_norm1"


def by_index(outcome: Outcome) -> dict[int, float]:
    return {p.class_id: p.probability for p in outcome.predictions}


def test_probabilities_are_those_of_the_pipeline_of_transformers(made):
    pipeline = transformers.pipeline(
        "zero-shot-image-classification",
        model=made.model,
        tokenizer=made.tokenizer,
        image_processor=made.processor,
    )
    (found,) = finish(made.engine, [job("a", seed=1, labels=FEW)])
    expected = pipeline(
        Image.fromarray(pixels(1)), candidate_labels=list(FEW), hypothesis_template="{}"
    )
    by_text = {FEW[i]: p for i, p in by_index(found).items()}
    assert by_text == pytest.approx({e["label"]: e["score"] for e in expected}, abs=1e-5)


def test_grad_cam_is_that_of_autograd_in_double_precision(made):
    model = made.model.double()
    try:
        inputs = torch.as_tensor(made.processor(Image.fromarray(pixels(2)))["pixel_values"][0])
        texts = made.tokenizer(list(MORE), return_tensors="pt", **made.padding)
        caught = []
        layer = model.vision_model.encoder.layers[1].layer_norm1
        handle = layer.register_forward_hook(lambda *a: caught.append(a[2]) or None)
        try:
            scores = model(pixel_values=inputs[None].double(), **texts).logits_per_image[0]
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(scores[3], caught[0])
    finally:
        made.model.float()
    activation, gradient = (t[0, -16:].detach() for t in (caught[0], gradient))
    expected = ((gradient.mean(0) * activation).sum(1).relu()).view(4, 4).numpy()
    target = Target(cls=ClassRef(kind="index", value=3))
    item = job("a", "explain", seed=2, labels=MORE, targets=(target,))
    (found,) = finish(made.engine, [item])
    assert expected.max() > 0
    np.testing.assert_allclose(found.explanations[0].map, expected, atol=1e-4 * expected.max())
    assert found.explanations[0].target.score == pytest.approx(float(scores[3].detach()), rel=1e-4)


METHODS = ("gradcam", "layercam", "scorecam", "rise", "finercam", "shapleycam", "saliency")


def test_jobs_with_other_labels_in_one_batch_get_what_they_get_alone(made):
    passes = []
    handle = made.warm.module.register_forward_hook(lambda *a: passes.append(len(a[1][0])))
    common = {"methods": METHODS, "samples": 6, "faithfulness": ("average_drop", "increase")}
    second = (Target(cls=ClassRef(kind="rank", value=2)),)
    jobs = [
        job("own", "explain", seed=1, **common),
        job("few", "explain", seed=1, labels=FEW, **common),
        job("more", "explain", seed=1, labels=MORE, targets=second, **common),
        job("predicted", seed=2, labels=MORE),
        job("other", seed=2, labels=FEW[::-1]),
    ]
    try:
        finish(made.engine, [job("before", labels=labels) for labels in (FEW, MORE, FEW[::-1])])
        passes.clear()
        made.engine.run(jobs)
        assert passes[0] == len(jobs)
        together = finish(made.engine, jobs)
    finally:
        handle.remove()
    for item, found in zip(jobs, together, strict=True):
        assert isinstance(found, Outcome), found
        (alone,) = finish(made.engine, [item])
        assert_same(found, alone, rtol=1e-3, atol=1e-4)
    assert [len(o.predictions) for o in together] == [3, 2, 5, 5, 2]
    maps = [{e.method: e.map for e in o.explanations} for o in together[:3]]
    assert not np.allclose(maps[0]["gradcam"], maps[1]["gradcam"])
    assert not np.allclose(maps[1]["gradcam"], maps[2]["gradcam"])


def steps_of(engine: Engine, item: Job) -> int:
    """Steps until a job is answered."""
    (answer,), steps = engine.run([item]), 0
    while isinstance(answer, Suspended):
        (answer,), steps = engine.advance([answer]), steps + 1
    assert isinstance(answer, Outcome), answer
    return steps


def test_labels_are_encoded_in_bounded_steps_and_only_once(clip, monkeypatch):
    texts = clip.warm.texts
    monkeypatch.setattr(texts, "takes", structs.replace(texts.takes, text_ms=125.0))
    new = tuple(f"{a} {b}" for a in ("cat", "dog") for b in ("cup", "photo", "cat"))
    # Two texts a step, and one step that leads to the pass.
    assert steps_of(clip.engine, job("a", labels=new)) == 4
    assert steps_of(clip.engine, job("b", labels=new)) == 0
    assert steps_of(clip.engine, job("c", labels=(*new[:4], "of a"))) == 2
    assert steps_of(clip.engine, job("d", labels=new[::-1])) == 0


def test_jobs_that_wait_for_the_same_labels_encode_them_once_and_share_a_pass(clip):
    encoded, passes = [], []
    network = clip.warm.texts._network
    handles = [
        network.register_forward_hook(lambda *a: encoded.append(len(a[2]))),
        clip.warm.module.register_forward_hook(lambda *a: passes.append(len(a[1][0]))),
    ]
    labels = ("coffee cat", "coffee dog")
    try:
        found = finish(clip.engine, [job(str(i), seed=i, labels=labels) for i in range(3)])
    finally:
        for handle in handles:
            handle.remove()
    assert all(isinstance(item, Outcome) for item in found)
    assert (sum(encoded), passes) == (2, [3])


def test_what_was_encoded_long_ago_is_forgotten_but_for_the_configured_labels(clip, monkeypatch):
    monkeypatch.setattr("models.texts.TEXTS_KEPT", 3)
    monkeypatch.setattr("models.texts.SETS_KEPT", 1)
    for labels in (("cat a", "dog a"), ("cat of", "dog of")):
        assert steps_of(clip.engine, job("a", labels=labels)) == 2
    assert steps_of(clip.engine, job("b", labels=("cat a", "dog a"))) == 2
    assert steps_of(clip.engine, job("c")) == 0


def test_a_label_that_is_too_long_is_named(clip):
    (found,) = clip.engine.run([job("a", labels=("a cat", "a " * 40))])
    assert isinstance(found, Failure)
    assert found.field == "labels.1"
    assert "42 tokens; the network takes 16" in found.message


def test_a_folder_needs_no_labels_of_its_own(tmp_path):
    bare = Saved(tmp_path, "clip", labels=None)
    card = bare.warm.info.card
    assert (card.num_classes, bare.warm.info.labels) == (0, ())
    (found,) = finish(bare.engine, [job("a", labels=tuple(LABELS))])
    assert len(found.predictions) == 3
    # As the worker proves that its device works.
    (canary,) = finish(bare.engine, [job("canary", top_k=1, targets=())])
    assert isinstance(canary, Outcome)
