"""What was proved before is read again, as long as nothing that it depends on has changed."""

from __future__ import annotations

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from models.catalog import ModelSpec
from models.proof_cache import ProofCache
from models.registry import ModelRegistry

NETWORK = """
import torch
from torch import nn


def build(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    spec = ModelSpec.model_validate(
        {
            "name": "tiny",
            "source": "python:net:build",
            "weights": "none",
            "num_classes": 3,
            "preprocess": {"resize": 32, "crop": 32},
        }
    )

    def load():
        registry = ModelRegistry("cpu", tmp_path, warmup_s=0.0, proofs_dir=tmp_path / "proofs")
        return registry, registry.load(spec)

    return load


def test_the_second_load_proves_nothing_and_finds_the_same(load, monkeypatch):
    monkeypatch.setattr("models.warmup.UNDISTURBED", 0.0)
    _, first = load()

    def fail(*_):
        raise AssertionError("proved again")

    monkeypatch.setattr("models.warmup.prove_layers", fail)
    monkeypatch.setattr("models.preparation.variant._equality", fail)
    monkeypatch.setattr("models.warmup.try_methods", fail)
    monkeypatch.setattr("models.warmup.measure_latencies", fail)
    registry, second = load()
    assert second.layers == first.layers
    assert second.card.methods == first.card.methods
    assert second.card.latency_ms == first.card.latency_ms
    assert second.card.preparation == first.card.preparation
    (variant,) = registry.get("tiny", "1").variants
    assert "2" in variant.readable
    assert variant.differentiable


def test_times_that_were_measured_on_a_busy_machine_are_not_kept(load, monkeypatch):
    monkeypatch.setattr("models.warmup.UNDISTURBED", 2.0)
    load()
    monkeypatch.setattr("models.warmup.measure_latencies", lambda *_, **__: {1: 7.0})
    assert load()[1].card.latency_ms == {1: 7.0}


def test_a_damaged_file_is_as_good_as_none(load, tmp_path):
    _, first = load()
    (file,) = (tmp_path / "proofs").iterdir()
    file.write_bytes(b"{")
    assert load()[1].layers == first.layers


def test_a_folder_that_cannot_be_written_does_no_harm(load, tmp_path):
    (tmp_path / "proofs").write_text("a file in its place")
    assert load()[1].card.ready


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


def other_weight(module):
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] += 1e-6
    return module


def other_structure(module):
    return nn.Sequential(module[0], nn.ReLU6()).eval()


@pytest.mark.parametrize("change", [other_weight, other_structure])
def test_another_network_has_proofs_of_its_own(tmp_path, change):
    scores = torch.zeros(3, 2)
    ProofCache.of(network(), scores, tmp_path).remember("fact", int, lambda: 1)
    again = ProofCache.of(copy.deepcopy(network()), scores, tmp_path)
    assert again.remember("fact", int, lambda: 2) == 1
    changed = ProofCache.of(change(network()), scores, tmp_path)
    assert changed.remember("fact", int, lambda: 2) == 2
    answered = ProofCache.of(network(), scores + 1, tmp_path)
    assert answered.remember("fact", int, lambda: 3) == 3


def test_few_proofs_are_kept(tmp_path):
    for number in range(70):
        scores = torch.full((1, 1), float(number))
        with ProofCache.of(network(), scores, tmp_path) as cache:
            cache.remember("fact", int, lambda: 1)
    assert len(list(tmp_path.iterdir())) <= 64


PROVE = """
import sys
from pathlib import Path
from models.proof_cache import ProofCache

folder = Path(sys.argv[1])
with ProofCache(folder / "net.json") as cache:
    cache.recall("layers", int)
    print("proving", flush=True)
    sys.stdin.read()
    cache.keep("layers", 7)
"""


@pytest.fixture
def prover(tmp_path):
    """Another process, in the middle of proving the network `net`."""
    with subprocess.Popen(
        [sys.executable, "-c", PROVE, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout.readline() == b"proving\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_what_another_process_proves_at_the_moment_is_waited_for(tmp_path, prover):
    def prove_it_again() -> int:
        raise AssertionError

    with ThreadPoolExecutor() as threads, ProofCache(tmp_path / "net.json") as cache:
        found = threads.submit(cache.remember, "layers", int, prove_it_again)
        with pytest.raises(TimeoutError):
            found.result(timeout=0.1)
        prover.stdin.close()
        assert found.result(timeout=30) == 7


@pytest.mark.slow
def test_what_a_killed_process_was_proving_is_proved_by_another(tmp_path, prover):
    with ThreadPoolExecutor() as threads, ProofCache(tmp_path / "net.json") as cache:
        found = threads.submit(cache.remember, "layers", int, lambda: 8)
        prover.kill()
        assert found.result(timeout=30) == 8


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_not_waited_for(tmp_path, prover, monkeypatch):
    monkeypatch.setattr("models.proof_cache._TURN_S", 0.0)
    with ProofCache(tmp_path / "net.json") as cache:
        assert cache.remember("layers", int, lambda: 8) == 8
    assert prover.poll() is None


def test_what_is_known_is_read_without_a_turn(tmp_path, monkeypatch):
    with ProofCache(tmp_path / "net.json") as cache:
        cache.keep("layers", 7)
    monkeypatch.delattr("models.proof_cache.fcntl")
    with ProofCache(tmp_path / "net.json") as cache:
        assert cache.recall("layers", int) == 7
