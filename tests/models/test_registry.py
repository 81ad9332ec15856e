"""Models come warm or not at all, broken entries disturb nobody, and cards tell what was probed."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch

from models import warmup
from models.catalog import ModelSpec
from models.errors import ModelLoadFailed, UnknownModel
from models.registry import ModelRegistry

NETWORKS = """
import torch
from torch import nn

SIZE = {"preprocess": {"crop": 24, "resize": 24, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}}

def net(*after):
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(inplace=True))
    return nn.Sequential(trunk, *after), SIZE

def pooled(num_classes=4):
    return net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))

def flat():
    return net(nn.Flatten(), nn.Linear(6 * 11 * 11, 4))

def mapless():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 4)), SIZE

class Large(nn.Module):
    def forward(self, x):
        return x * 1e6

def overflowing():
    return net(Large(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
"""


@pytest.fixture
def registry(tmp_path, monkeypatch) -> ModelRegistry:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "registry_networks", raising=False)
    (tmp_path / "registry_networks.py").write_text(NETWORKS)
    return ModelRegistry("cpu", tmp_path, warmup_s=0.01)


def entry(factory: str, **fields) -> ModelSpec:
    source = f"python:registry_networks:{factory}"
    return ModelSpec(**{"name": factory, "source": source} | fields)


def test_a_loaded_model_is_warm_and_described(registry):
    info = registry.load(entry("pooled", labels=["a", "b", "c", "d"]))
    card = info.card
    assert (card.state, card.ready, card.devices) == ("ready", True, ("cpu",))
    assert (card.num_classes, info.labels) == (4, ("a", "b", "c", "d"))
    assert (card.target_layer, card.head, card.closed_form) == ("0", "gap_linear", True)
    assert card.input.crop == (24, 24)
    assert 1 in card.latency_ms
    assert card.best_batch in card.latency_ms
    assert {row.name: row.applicable for row in card.methods}["cam"]
    assert [layer.name for layer in info.layers if layer.recommended] == ["0"]
    assert registry.infos() == [info]


def test_heads_without_a_closed_form(registry):
    card = registry.load(entry("flat")).card
    assert (card.head, card.closed_form) == ("flatten", False)
    support = {row.name: row for row in card.methods}
    assert not support["cam"].applicable
    assert support["gradcam"].applicable


def test_a_model_without_maps_predicts_only(registry):
    card = registry.load(entry("mapless")).card
    assert (card.target_layer, card.head) == (None, None)
    assert not any(row.applicable for row in card.methods if row.name in ("cam", "gradcam"))


def test_normalising_is_what_the_preprocessing_says(registry):
    registry.load(entry("pooled"))
    model = registry.get("pooled", "1")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    made = model.normalise(torch.from_numpy(pictures))
    expected = (pictures / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
    assert np.abs(made.permute(0, 2, 3, 1).numpy() - expected).max() < 2e-6
    assert made.dtype == torch.float32
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_facts_about_layers(registry):
    registry.load(entry("flat"))
    model = registry.get("flat", "1")
    assert model.input_size == (24, 24)
    assert model.chunk == model.info.card.best_batch
    assert [model.channels(name) for name in ("0", "1", "2", "no such layer")] == [6, 726, 4, None]
    assert set(model.layouts) == {"0", "0.0", "0.1"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("0.7", r"no layer named 0\.7\. Close names: 0\.\d"),
        ("2", "target_layer 2 cannot be explained: its output is not a map"),
        ("1", "target_layer 1 cannot be explained: its output is not a map"),
    ],
)
def test_a_configured_target_layer_must_be_a_map(registry, target, message):
    with pytest.raises(ModelLoadFailed, match=message):
        registry.load(entry("flat", target_layer=target))


def test_a_configured_target_layer_is_used(registry):
    info = registry.load(entry("pooled", target_layer="0.0"))
    assert (info.card.target_layer, info.card.head) == ("0.0", "flatten")
    assert [layer.name for layer in info.layers if layer.recommended] == ["0.0"]


def test_half_precision(registry, every_precision):
    registry.load(entry("pooled", precision="bf16"))
    model = registry.get("pooled", "1")
    kinds = {name: p.dtype for name, p in model.module.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if name.startswith("0.")} == {torch.bfloat16}
    # The layer that makes the scores stays in float32.
    assert {dtype for name, dtype in kinds.items() if name[0] != "0"} == {torch.float32}
    made = model.normalise(torch.zeros(1, 24, 24, 3, dtype=torch.uint8))
    assert made.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32
    assert model.info.card.precision == "bf16"


def test_a_precision_that_the_device_has_no_instructions_for_is_skipped(registry, monkeypatch):
    monkeypatch.setattr("models.preparation.optimise.has_instructions", lambda *_: False)
    card = registry.load(entry("pooled", precision="bf16")).card
    assert card.precision == "fp32"
    assert "bf16 skipped: the device has no instructions for it" in card.preparation


def test_a_precision_that_spoils_the_scores_is_skipped_and_the_card_says_so(
    registry, every_precision
):
    card = registry.load(entry("overflowing", precision="fp16")).card
    assert card.precision == "fp32"
    assert any(step.startswith("fp16 skipped") for step in card.preparation)


def test_a_model_is_fused_and_the_card_says_so(registry):
    card = registry.load(entry("pooled")).card
    assert "1 fused convolutions" in card.preparation
    assert card.target_layer in registry.get("pooled", "1").variants[0].rewritable


def test_a_broken_entry_leaves_what_was_loaded(registry):
    info = registry.load(entry("pooled"))
    with pytest.raises(ModelLoadFailed):
        registry.load(entry("pooled", num_classes=3, labels=["a"]))
    assert registry.get("pooled", "1").info == info
    # A failed replacement does not make the running version unavailable.
    assert registry.mark_unavailable(entry("pooled"), "broken").card.ready


def test_broken_entries_are_listed_with_their_reason(registry):
    registry.load(entry("pooled"))
    registry.mark_unavailable(entry("absent"), "There is no such thing.")
    cards = {info.card.name: info.card for info in registry.infos()}
    assert (cards["absent"].state, cards["absent"].ready) == ("unavailable", False)
    assert cards["absent"].reason == "There is no such thing."
    with pytest.raises(UnknownModel, match="absent@1 is not loaded"):
        registry.get("absent", "1")


def test_loading_ends_being_unavailable(registry):
    registry.mark_unavailable(entry("pooled"), "broken")
    registry.load(entry("pooled"))
    assert [info.card.state for info in registry.infos()] == ["ready"]


def test_versions_are_listed_and_unloaded_alone(registry):
    for version in ("1", "2"):
        registry.load(entry("pooled", version=version))
    assert [info.card.version for info in registry.infos()] == ["1", "2"]
    registry.unload("pooled", "1")
    assert [info.card.version for info in registry.infos()] == ["2"]
    registry.load(entry("pooled", version="3"))
    registry.unload("pooled")
    assert registry.infos() == []
    for version in (None, "2"):
        with pytest.raises(UnknownModel):
            registry.unload("pooled", version)


def test_a_replacement_is_seen_only_when_it_is_warm(registry, monkeypatch):
    registry.load(entry("pooled", num_classes=4))
    warming, finish = threading.Event(), threading.Event()
    measure = warmup.measure_latencies

    def pause(*args, **kwargs):
        warming.set()
        assert finish.wait(10)
        return measure(*args, **kwargs)

    monkeypatch.setattr(warmup, "measure_latencies", pause)
    loader = threading.Thread(target=registry.load, args=(entry("pooled", num_classes=7),))
    loader.start()
    try:
        assert warming.wait(10)
        assert registry.get("pooled", "1").info.card.num_classes == 4
    finally:
        finish.set()
        loader.join()
    assert registry.get("pooled", "1").info.card.num_classes == 7


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory: secret"), "does not fit"),
        (RuntimeError("secret"), "fails on the device cpu"),
    ],
)
def test_what_the_device_says_stays_in_the_logs(registry, monkeypatch, error, message):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(warmup, "measure_latencies", fail)
    with pytest.raises(ModelLoadFailed, match=message) as caught:
        registry.load(entry("pooled"))
    assert "secret" not in caught.value.message
    assert caught.value.__cause__ is error


def test_the_module_is_laid_out_channels_last_without_hooks(registry):
    registry.load(entry("pooled"))
    module = registry.get("pooled", "1").module
    assert module[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
