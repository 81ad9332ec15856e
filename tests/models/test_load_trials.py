"""Trials at loading run on copies, refuse a method or an optimisation, and never the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.catalog import ModelSpec
from models.engine import Engine
from models.head import head_batch
from models.methods import applicability
from models.preparation.convolution import FusedConv2d
from models.registry import ModelRegistry
from models.sources import Built
from models.types import Preprocess
from tests.models.conftest import OneModel, PoolNet, frozen, warm_of
from tests.models.cuda.conftest import graphed
from tests.models.preparation.conftest import SIDE, warm
from tests.models.test_engine import assert_same, finish, job


def support(model) -> dict:
    return {row.name: row for row in model.info.card.methods}


class Remembers(PoolNet):
    """Keeps the sizes of everything that it was run on."""

    sizes: tuple = ()

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        self.sizes = self.sizes if size in self.sizes else (*self.sizes, size)
        return super().forward(x)


def test_the_served_network_has_seen_nothing_but_its_own_size():
    assert warm(frozen(Remembers())).module.sizes == ((SIDE, SIDE),)


class Spoilt(PoolNet):
    """Answers no longer as before once it has seen a larger image, as some do that keep tables."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > SIDE:
            self.scale = 2.0
        return super().forward(x) * self.scale


def test_scores_are_the_networks_own_after_all_trials():
    net = frozen(Spoilt())
    images = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(warm(net).module(images), net(images))


@pytest.mark.parametrize(
    ("trial", "method"), [("relevance", "lrp"), ("verify_transformer", "legrad")]
)
def test_a_trial_that_fails_refuses_its_method_only(monkeypatch, caplog, trial, method):
    def fail(*_: object) -> None:
        raise IndexError("secret")

    monkeypatch.setattr(applicability, trial, fail)
    rows = support(warm(frozen(PoolNet())))
    assert rows[method].reason == "its trial on the network fails (IndexError); the log says more"
    assert rows["gradcam"].applicable
    assert "secret" in caplog.text


class FiveDimensions(PoolNet):
    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.out(self.body(self.act(self.stem(x))))
        return self.fc(self.pool(self.volume(maps[:, None])[:, 0]).flatten(1))


def test_parameters_of_five_dimensions():
    model = warm(frozen(FiveDimensions()))
    assert "channels_last" in model.info.card.preparation
    assert model.module.stem.weight.is_contiguous(memory_format=torch.channels_last)


class Uncopied(PoolNet):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        raise TypeError("secret")


def test_a_network_that_cannot_be_copied_is_served_without_trials(caplog, monkeypatch):
    net = frozen(Uncopied())
    monkeypatch.setattr("copy.deepcopy", _unless(Uncopied))
    model = warm(net)
    assert model.info.card.ready
    assert "channels_last skipped: it fails (TypeError)" in model.info.card.preparation[0]
    assert "fails (TypeError)" in support(model)["lrp"].reason


def _unless(kind: type):
    """`copy.deepcopy`, except that the first network of a kind is returned as it is."""
    import copy

    original, first = copy.deepcopy, []

    def deepcopy(value, memo=None):
        if isinstance(value, kind) and not first:
            first.append(value)
            return value
        return original(value, memo)

    return deepcopy


class Floating(PoolNet):
    """Computes a part in float32, whatever it is cast to, and does not cast it back."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.out(self.body(self.act(self.stem(x))))
        return self.fc(self.middle(maps.mean((2, 3)).float()))


def test_a_precision_in_which_the_network_fails_is_skipped(every_precision):
    model = warm(frozen(Floating()), precision="bf16")
    assert (model.dtype, model.info.card.precision) == (torch.float32, "fp32")
    assert any("bf16 skipped: it fails (RuntimeError)" in s for s in model.info.card.preparation)


class NoGrad(PoolNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Inference(PoolNet):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [NoGrad, Inference])
def test_without_gradients_methods_that_need_them_are_refused_for_that_reason(kind):
    rows = support(warm(frozen(kind(inplace=False))))
    for name in ("gradcam", "saliency", "smoothgrad"):
        assert "no gradient of the scores reaches the image" in rows[name].reason
    assert rows["occlusion"].applicable
    assert rows["rise"].applicable


@pytest.mark.parametrize("kind", [NoGrad, Inference])
def test_without_gradients_methods_that_need_none_explain_the_last_map(kind):
    model, plain = warm(frozen(kind(inplace=False))), warm(frozen(PoolNet(inplace=False)))
    rows = support(model)
    assert (model.target_layer, model.info.card.head) == (plain.target_layer, None)
    for name in ("eigencam", "kpca_cam", "fem", "scorecam", "is_cam", "ablationcam"):
        assert rows[name].applicable
        assert finish(Engine(OneModel(model)), [job("a", methods=(name,), samples=4)])[
            0
        ].explanations
    assert "no gradient of the scores reaches the image" in rows["eigengradcam"].reason
    assert warm(frozen(kind(inplace=False)), target_layer="act").target_layer == "act"


def test_a_detached_stem_leaves_no_gradient_of_the_image():
    class Detached(PoolNet):
        def forward(self, x: Tensor) -> Tensor:
            maps = self.act(self.stem(x)).detach()
            return self.fc(self.pool(self.out(self.body(maps))).flatten(1))

    rows = support(warm(frozen(Detached())))
    assert "no gradient of the scores reaches the image" in rows["saliency"].reason


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_network_predicts_and_says_why_it_has_no_gradient():
    quantise = torch.ao.quantization.quantize_dynamic
    rows = support(warm(quantise(frozen(PoolNet()), {nn.Linear}, dtype=torch.qint8)))
    for name in ("gradcam", "cam", "saliency"):
        assert "quantised" in rows[name].reason
    assert rows["rise"].applicable


class Bounded(PoolNet):
    """Global average pooling, a bound that few images reach, one linear layer."""

    bound = 1.5

    def forward(self, x: Tensor) -> Tensor:
        maps = self.out(self.body(self.act(self.stem(x))))
        return self.fc(maps.mean((2, 3)).clamp(max=self.bound))


def bounded(bound: float) -> nn.Module:
    torch.manual_seed(1)
    net = Bounded()
    net.bound = bound
    return frozen(net)


def test_the_closed_form_is_proved_on_images_of_every_kind():
    size = Preprocess(resize=SIDE, crop=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.25,) * 3)
    images = head_batch(size)
    assert images.shape == (4, 3, SIDE, SIDE)
    assert (images[2] == -2).all()
    assert (images[3] == 2).all()
    # Noise does not reach the bound, strong noise does.
    net = bounded(1e9)
    pooled = net.out(net.body(net.act(net.stem(images)))).mean((2, 3)).amax(1)
    bound = float(pooled[0] + pooled[1]) / 2
    assert warm(bounded(1e9)).info.card.closed_form
    assert not warm(bounded(bound)).info.card.closed_form


@pytest.mark.parametrize("recorded", [False, True])
def test_the_closed_form_is_compared_with_the_scores_of_every_batch(recorded, caplog):
    net = bounded(0.05)
    granted = warm_of(net, linear=net.fc)
    if recorded:
        granted = graphed(granted)
    jobs = [
        job(name, seed=i, methods=(name,), samples=4)
        for i, name in enumerate(
            ("gradcam", "hirescam", "ablationcam", "finercam", "smooth_gradcam_plus_plus")
        )
    ]
    for one in jobs:
        (found,), (expected,) = (
            finish(Engine(OneModel(model)), [one]) for model in (granted, warm_of(net))
        )
        assert_same(found, expected)


def test_a_convolution_that_onednn_refuses_once_is_logged_and_tried_for_other_sizes(
    monkeypatch, caplog
):
    torch.manual_seed(0)
    conv = FusedConv2d(frozen(nn.Conv2d(3, 4, 3)), None, None)
    packed, refused = conv._packed, []

    def failing(x, residual):
        if x.shape[2] == 8:
            refused.append(1)
            raise RuntimeError("could not create a primitive")
        return packed(x, residual)

    monkeypatch.setattr(conv, "_packed", failing)
    with torch.inference_mode():
        for side in (8, 8, 9):
            conv(torch.randn(1, 3, side, side))
    assert len(refused) == 1
    assert "could not create a primitive" in caplog.text
    assert conv._packings


def test_uploads_and_graphs_are_only_made_where_they_are_asked_for(monkeypatch, tmp_path):
    built = Built(module=frozen(PoolNet()), preprocess=Preprocess(resize=SIDE, crop=(SIDE, SIDE)))
    monkeypatch.setattr("models.sources.python.build", lambda request: built)
    registry = ModelRegistry("cpu", tmp_path, warmup_s=0.01)
    registry.load(ModelSpec(name="m", source="python:x:y"))
    model = registry.get("m", "1")
    assert (model.uploads, model.graphs) == (None, None)
