"""What went wrong on a device, judged by the exception's type and text, so that torch need not be imported."""

from __future__ import annotations

from typing import Literal

Fault = Literal["memory", "device", "model"]

EXIT_DEVICE_LOST = 70
"""Exit code by which a worker says that its device needs a new process."""

_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cudaerrormemoryallocation",
)
_DEVICE = (
    "cuda error",
    "cuda driver error",
    "cuda kernel errors",
    "device-side assert",
    "cublas_status_",
    "cudnn_status_",
    "cudnn error",
    "cusolver_status_",
    "nccl error",
)


def classify(error: BaseException) -> Fault:
    """Say what an exception out of the engine means.

    Returns:
        `memory`: the device is out of memory and fit for more once some is freed. `device`: CUDA's
        errors of all other kinds are sticky: the process must be replaced (CUDA C++ Programming
            Guide, "Error Checking": the context is corrupt and cannot be used).
        `model`: an ordinary error of the model or of ours, which harms no other batch.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    if names & {"OutOfMemoryError", "MemoryError"}:
        return "memory"
    if isinstance(error, RuntimeError):
        if any(sign in text for sign in _MEMORY):
            return "memory"
        if "AcceleratorError" in names or any(sign in text for sign in _DEVICE):
            return "device"
    return "model"
