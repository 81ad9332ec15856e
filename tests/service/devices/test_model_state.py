"""Models merged over devices, and their fingerprints."""

from __future__ import annotations

import msgspec
import pytest
from fake_engine import spec

from models.types import LayerInfo, ModelCard, ModelInfo, Preprocess
from service.devices.model_state import (
    keep_known_models,
    loading_model,
    merge,
    with_fingerprint,
)


def info(name="m", version="1", *, state="ready", **rest) -> ModelInfo:
    card = ModelCard(
        name=name, version=version, state=state, ready=state == "ready", source="s", **rest
    )
    return ModelInfo(card=card, labels=(state,))


def test_cards_of_several_devices_become_one():
    reported = {
        "cpu:0": [info(state="loading"), info(version="2")],
        "cpu:1": [info()],
        "cpu:2": [info(state="unavailable", reason="why")],
    }
    first, second = merge(reported, connected={"cpu:0", "cpu:1"}, coming={"cpu:0", "cpu:1"})
    assert (first.card.version, second.card.version) == ("1", "2")
    assert first.card.devices == ("cpu:1",)
    assert first.card.versions == second.card.versions == ("1", "2")
    assert first.labels == ("ready",)


def test_a_model_stays_ready_while_its_device_comes_back_and_not_when_it_does_not():
    reported = {"cpu": keep_known_models([info(), info("gone")], [info(state="loading")])}
    (restarting,) = merge(reported, connected=set(), coming={"cpu"})
    assert restarting.card.ready
    assert restarting.card.devices == ()
    assert restarting.labels == ("ready",)
    (lost,) = merge(reported, connected=set(), coming=set())
    assert not lost.card.ready


def test_what_a_restart_finds_broken_is_not_remembered_as_warm():
    (now,) = keep_known_models([info()], [info(state="unavailable")])
    assert now.card.state == "unavailable"


def test_a_model_that_is_being_loaded():
    assert loading_model(spec()).card.state == "loading"


# ---------------------------------------------------------------- fingerprints


INFO = ModelInfo(
    card=ModelCard(
        name="m",
        version="1",
        state="ready",
        ready=True,
        source="timm:x",
        num_classes=2,
        input=Preprocess(resize=8, crop=(8, 8)),
    ),
    labels=("a", "b"),
    layers=(
        LayerInfo(name="l", type="Conv2d", output_shape=(8, 7, 7), spatial=True, parameters=1),
    ),
)


def fingerprint(**changes: object) -> str:
    card = {k: v for k, v in changes.items() if k in ModelCard.__struct_fields__}
    rest = {k: v for k, v in changes.items() if k not in card}
    info = msgspec.structs.replace(INFO, card=msgspec.structs.replace(INFO.card, **card), **rest)
    return with_fingerprint(info).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ("b", "a")},
        {"num_classes": 3},
        {"task": "multi_label"},
        {"input": Preprocess(resize=8, crop=(8, 8), mean=(0.5, 0.5, 0.5))},
        {"layers": ()},
    ],
)
def test_a_fingerprint_changes_with_what_requests_are_resolved_against(changes):
    assert fingerprint(**changes) != fingerprint()


def test_a_fingerprint_is_the_same_on_every_device_and_after_a_restart():
    assert fingerprint() == fingerprint(devices=("cuda:1",), latency_ms={1: 3.0}, best_batch=4)
    assert len(fingerprint()) == 16
