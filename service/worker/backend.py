"""What the compute thread needs of an engine and of its listener. No torch here."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from models.catalog import ModelSpec
from models.errors import HeatlensError, ModelLoadFailed
from models.types import Failure, Job, ModelCard, ModelInfo, Outcome
from service.devices.model_state import with_fingerprint
from service.worker.queue import Suspended

Result = Outcome | Failure | Suspended


class Engine(Protocol):
    """Runs jobs of one model on a device; see `models.engine.Engine`."""

    def run(self, jobs: Sequence[Job]) -> Sequence[Result]:
        """One trunk pass for all jobs; a result each, in order."""
        ...

    def advance(self, pending: Sequence[Any]) -> Sequence[Result]:
        """One bounded step of each long job (its own `Suspended`s); a result each, in order."""
        ...


class Registry(Protocol):
    """Holds the warm models of a device; see `models.registry.ModelRegistry`."""

    def load(self, spec: ModelSpec) -> ModelInfo:
        """Load, verify and warm a model version, then swap it in."""
        ...

    def unload(self, name: str, version: str) -> None:
        """Drop a model version."""
        ...

    def infos(self) -> Sequence[ModelInfo]:
        """Every model version, unavailable ones included."""
        ...

    def mark_unavailable(self, spec: ModelSpec, reason: str) -> object:
        """List a model version that could not be loaded."""
        ...


def process_memory_bytes() -> int:
    """Resident memory of this process: what a CPU device holds. 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Backend:
    """What runs on the device; made in the compute thread and used by no other.

    Attributes:
        free_memory: gives back what is not in use.
        memory_bytes: memory that is held on the device.
    """

    registry: Registry
    engine: Engine
    free_memory: Callable[[], object]
    memory_bytes: Callable[[], int] = process_memory_bytes


class Listener(Protocol):
    """Hears of results; called in the compute thread, so it must not block."""

    def answered(self, results: Sequence[Outcome | Failure]) -> None:
        """Jobs have ended."""
        ...

    def models_changed(self, infos: Sequence[ModelInfo]) -> None:
        """Models were loaded, dropped or found broken."""
        ...

    def lost(self, reason: str) -> None:
        """The device needs a new process; the thread has ended, the jobs on the board are unanswered."""
        ...


class DeviceLost(Exception):
    """The device needs a new process."""


# ---------------------------------------------------------------- faults


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


def classify_exception(error: BaseException) -> Fault:
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


# ---------------------------------------------------------------- loading


log = logging.getLogger("heatlens.compute")


def load_model(backend: Backend, spec: ModelSpec) -> ModelCard | HeatlensError:
    """Load, verify and warm a model, in the place of its name and version.

    Returns:
        Its card, or the error; what was raised, and the tensors in its traceback, is gone.

    Raises:
        DeviceLost: the device needs a new process.
    """
    try:
        return with_fingerprint(backend.registry.load(spec)).card
    except HeatlensError as error:
        return type(error)(error.message, field=error.field)
    except Exception as error:
        fault = classify_exception(error)
        log.exception("loading %s@%s failed: %s", spec.name, spec.version, fault)
        if fault == "device":
            raise DeviceLost("device error") from None
        if fault == "memory":
            backend.free_memory()
            return ModelLoadFailed("The device has no memory for the model.")
        return ModelLoadFailed("The model could not be loaded; the service's log says why.")


# ---------------------------------------------------------------- engine_backend


def make_engine_backend(device: str, *, base_dir: Path, threads: int | None = None) -> Backend:
    """Make registry and engine; called in the thread that will use them, for it imports torch.

    Args:
        device: `cpu`, `cpu:N` (N only tells workers apart), `cuda` or `cuda:N`.
        base_dir: folder against which relative paths of the catalog are meant.
        threads: torch threads of a CPU device; None leaves torch's own.
    """
    import torch

    from models.engine import Engine
    from models.registry import ModelRegistry

    if device.startswith("cpu"):
        if threads is not None:
            torch.set_num_threads(threads)
        registry = ModelRegistry("cpu", base_dir)
        return Backend(registry=registry, engine=Engine(registry), free_memory=gc.collect)
    torch.cuda.set_device(device)
    # float32 means float32: torch would let convolutions round to the 10 bits of TF32.
    torch.backends.cudnn.allow_tf32 = False
    registry = ModelRegistry(device, base_dir)
    return Backend(
        registry=registry,
        engine=Engine(registry),
        free_memory=torch.cuda.empty_cache,
        memory_bytes=torch.cuda.memory_reserved,
    )
