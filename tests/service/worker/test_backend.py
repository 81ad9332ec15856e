"""The classes of exceptions."""

from __future__ import annotations

import pytest
import torch

from service.worker.backend import classify_exception


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
