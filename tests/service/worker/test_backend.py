"""The classes of exceptions, what is kept of a failed load, and what is imported ahead."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from models import sources
from models.catalog import ModelSpec
from models.errors import ModelLoadFailed
from models.registry import ModelRegistry
from models.types import Failure
from service.worker.backend import Backend, classify_exception, import_libraries, load_model


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


def test_the_cause_of_a_failed_load_is_kept_for_the_operator_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "net_that_raises.py").write_text(
        "def build():\n    raise FileNotFoundError('secret/backbone.pth')\n"
    )
    registry = ModelRegistry("cpu", tmp_path)
    spec = ModelSpec(name="m", source="python:net_that_raises:build")
    backend = Backend(registry=registry, engine=None, free_memory=lambda: None)
    with caplog.at_level(logging.DEBUG):
        error = load_model(backend, spec)
    assert isinstance(error, ModelLoadFailed)
    assert error.cause == "FileNotFoundError: secret/backbone.pth (net_that_raises.py:2)"
    # In the log, with its traceback at the level of debugging, and in no answer.
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
    assert re.search(r"Traceback(.|\n)*net_that_raises\.py(.|\n)*secret/backbone", caplog.text)
    assert "secret" not in str(Failure.of("1", error))
    assert error.__cause__ is None
    card = registry.mark_unavailable(spec, error.message, cause=error.cause).card
    assert (card.reason, card.cause) == (error.message, error.cause)


def test_a_library_that_cannot_be_imported_does_not_hold_up_the_others(monkeypatch):
    asked = []

    def import_source(spec: ModelSpec) -> None:
        asked.append(spec.name)
        if spec.name == "broken":
            raise ImportError("no such library")

    monkeypatch.setattr(sources, "import_source", import_source)
    specs = [
        ModelSpec(name=name, source="timm:resnet18", weights="none", runtime="torch")
        for name in ("broken", "other")
    ]
    import_libraries(specs)
    assert asked == ["broken", "other"]
