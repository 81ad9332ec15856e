"""The small parts: latencies, restart budgets, devices, cards, fault classes, the runtime folder."""

from __future__ import annotations

import signal
import stat
import tempfile
from collections.abc import Iterator

import pytest
import torch
from fake_engine import spec
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ERRORS, InternalError, Overloaded
from models.types import Failure, ModelCard, ModelInfo
from service.devices.messages import from_wire, to_wire
from service.devices.model_state import job_ms, keep_known_models, loading_model, merge
from service.devices.runtime_dir import RuntimeDir, holds
from service.hardware import resolve_devices, threads_per_device
from service.supervisor.child import RestartBudget, describe_end
from service.worker.backend import classify_exception
from service.worker.queue import LatencyModel

# ---------------------------------------------------------------- latency


def test_latency_between_and_beyond_what_was_measured():
    model = LatencyModel({1: 10, 4: 16, 8: 30})
    assert [model.predict_ms(n) for n in (1, 2, 3, 4, 6, 8, 16)] == [10, 12, 14, 16, 23, 30, 60]
    assert LatencyModel().predict_ms(3) > 0


@given(st.integers(1, 16), st.floats(0.1, 1e4))
def test_latency_follows_what_is_observed(size, duration_ms):
    model = LatencyModel({1: 10, 8: 30})
    before = model.predict_ms(size)
    model.observe(size, duration_ms)
    once = model.predict_ms(size)
    assert once == pytest.approx(before + 0.2 * (duration_ms - before))
    for _ in range(60):
        model.observe(size, duration_ms)
    assert model.predict_ms(size) == pytest.approx(duration_ms, rel=0.01, abs=0.05)


def test_latency_of_an_unmeasured_model_is_its_first_observation():
    model = LatencyModel()
    model.observe(2, 7.0)
    assert model.predict_ms(2) == 7.0


# ---------------------------------------------------------------- restarts


def test_the_budget_is_spent_and_comes_back():
    budget = RestartBudget(restarts=3, window_s=60)
    assert all(budget.pause_s(now, proven=False) is not None for now in (0, 1, 2))
    assert budget.pause_s(59, proven=False) is None
    assert budget.pause_s(60.5, proven=False) is not None
    assert RestartBudget(restarts=0, window_s=60).pause_s(0, proven=True) is None


def test_pauses_double_unless_the_process_had_proved_itself():
    budget = RestartBudget(restarts=1000, window_s=60)
    pauses = [budget.pause_s(n, proven=False) for n in range(12)]
    for n, pause in enumerate(pauses):
        longest = min(5.0, 0.1 * 2 ** (n + 1))
        assert longest / 2 <= pause <= longest
    assert budget.pause_s(13, proven=True) <= 0.1
    assert len(set(pauses)) == len(pauses), "no jitter"


def test_ends_are_named():
    assert describe_end(0) == "exit 0"
    assert describe_end(-signal.SIGSEGV) == "SIGSEGV"
    assert describe_end(-250) == "signal 250"


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("names", "cores", "gpus", "devices"),
    [
        (["auto"], 1, 0, ("cpu",)),
        (["auto"], 2, 0, ("cpu:0", "cpu:1")),
        (["auto"], 64, 0, ("cpu:0", "cpu:1", "cpu:2", "cpu:3")),
        (["auto"], 64, 2, ("cuda:0", "cuda:1")),
        (["cpu"], 8, 2, ("cpu",)),
        (["cuda:1", "cpu", "cuda:1"], 8, 2, ("cuda:1", "cpu")),
    ],
)
def test_devices(names, cores, gpus, devices):
    assert resolve_devices(names, cores=cores, count_gpus=lambda: gpus) == devices


def test_cpu_devices_share_the_cores():
    assert threads_per_device(("cpu:0", "cpu:1"), cores=9) == 4
    assert threads_per_device(("cpu:0", "cpu:1"), cores=1) == 1
    assert threads_per_device(("cuda:0",), cores=8) == 8


def test_a_model_may_name_devices_or_kinds():
    assert holds(spec(), "cuda:3")
    assert holds(spec(devices=["cpu"]), "cpu:1")
    assert holds(spec(devices=["cuda:0"]), "cuda:0")
    assert not holds(spec(devices=["cuda:0"]), "cuda:1")


# ---------------------------------------------------------------- cards


def info(name="m", version="1", *, state="ready", **rest) -> ModelInfo:
    card = ModelCard(
        name=name, version=version, state=state, ready=state == "ready", source="s", **rest
    )
    return ModelInfo(card=card, labels=(state,))


def test_cards_of_several_devices_become_one():
    said = {
        "cpu:0": [info(state="loading"), info(version="2")],
        "cpu:1": [info()],
        "cpu:2": [info(state="unavailable", reason="why")],
    }
    first, second = merge(said, connected={"cpu:0", "cpu:1"}, coming={"cpu:0", "cpu:1"})
    assert (first.card.version, second.card.version) == ("1", "2")
    assert first.card.devices == ("cpu:1",)
    assert first.card.versions == second.card.versions == ("1", "2")
    assert first.labels == ("ready",)


def test_a_model_stays_ready_while_its_device_comes_back_and_not_when_it_does_not():
    said = {"cpu": keep_known_models([info(), info("gone")], [info(state="loading")])}
    (restarting,) = merge(said, connected=set(), coming={"cpu"})
    assert restarting.card.ready
    assert restarting.card.devices == ()
    assert restarting.labels == ("ready",)
    (lost,) = merge(said, connected=set(), coming=set())
    assert not lost.card.ready


def test_what_a_restart_finds_broken_is_not_remembered_as_warm():
    (now,) = keep_known_models([info()], [info(state="unavailable")])
    assert now.card.state == "unavailable"


def test_the_cost_of_a_job():
    assert job_ms(info(best_batch=4, latency_ms={1: 10, 4: 20}).card) == 5
    assert job_ms(info().card) > 0
    assert loading_model(spec()).card.state == "loading"


# ---------------------------------------------------------------- faults and failures


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "memory"),
        (MemoryError(), "memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            "memory",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "memory"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "device"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
            "device",
        ),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), "model"),
        (ValueError("CUDA error: said by somebody else"), "model"),
        (AssertionError(), "model"),
    ],
)
def test_fault_classes(error, fault):
    assert classify_exception(error) == fault


def test_torchs_own_exceptions_are_known():
    """The real class of CUDA faults, and a real allocation that no machine can make."""
    assert (
        classify_exception(torch.AcceleratorError("CUDA error: unspecified launch failure"))
        == "device"
    )
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert classify_exception(caught.value) == "memory"


@pytest.mark.parametrize("code", ERRORS)
def test_errors_survive_as_failures(code):
    error = ERRORS[code]("what", field="methods.0", retry_after_s=2.5)
    back = from_wire(to_wire("id", error))
    assert type(back) is type(error)
    assert (back.message, back.field, back.retry_after_s) == ("what", "methods.0", 2.5)


def test_an_unknown_code_is_an_internal_error():
    assert type(from_wire(Failure(id="x", code="no_such", message="m"))) is InternalError
    assert to_wire("x", Overloaded("m")).code == "overloaded"


# ---------------------------------------------------------------- runtime folder


@pytest.fixture
def runtime(monkeypatch) -> Iterator[RuntimeDir]:
    with tempfile.TemporaryDirectory(prefix="h") as short:  # shorter than pytest's own folder
        monkeypatch.setattr("tempfile.tempdir", short)
        yield RuntimeDir.create()


def test_the_folder_is_private(runtime):
    assert stat.S_IMODE(runtime.path.stat().st_mode) == 0o700
    assert runtime.socket_url("cuda:0", 3) == f"ipc://{runtime.path}/worker-cuda-0-3"


def test_the_catalog_is_changed_as_a_whole(runtime):
    runtime.write_catalog([spec("a")])
    runtime.change_catalog(lambda specs: [*specs, spec("b", version="2")])
    assert [(s.name, s.version) for s in runtime.read_catalog()] == [("a", "1"), ("b", "2")]
    assert not [path for path in runtime.path.iterdir() if path.name.startswith("tmp")]


def test_a_path_too_long_for_a_socket_is_said_at_once(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(OSError, match="TMPDIR"):
        RuntimeDir.create()
    assert not list(deep.iterdir())
