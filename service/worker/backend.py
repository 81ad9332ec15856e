"""The compute thread's interface to an engine, and the real engine; only this module uses torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from models.catalog import ModelSpec
from models.errors import HeatlensError, ModelLoadFailed, cause_of
from models.heap import release_heap
from models.types import Failure, Job, ModelInfo, Outcome
from service.devices.model_state import with_fingerprint
from service.worker.pace import Suspended

log = logging.getLogger("heatlens.compute")

Result = Outcome | Failure | Suspended
Fault = Literal["memory", "device", "model"]

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


class Engine(Protocol):
    """Runs jobs of one model on a device; see `models.engine.Engine`.

    Attributes:
        beat: called now and then in a long run, as a sign of life.
    """

    beat: Callable[[], object]

    def run(self, jobs: Sequence[Job]) -> Sequence[Result]:
        """Run one pass for all jobs; a result each, in order."""

    def advance(self, suspended: Sequence[Any]) -> Sequence[Result]:
        """Run one bounded step of each long job; a result each, in order."""


class Registry(Protocol):
    """Holds the warm models of a device; see `models.registry.ModelRegistry`."""

    def load(self, spec: ModelSpec) -> ModelInfo:
        """Load, verify and warm a model version, then swap it in."""

    def unload(self, name: str, version: str) -> None:
        """Drop a model version."""

    def infos(self) -> Sequence[ModelInfo]:
        """Every model version, unavailable ones included."""

    def mark_unavailable(self, spec: ModelSpec, reason: str, *, cause: str | None) -> object:
        """List a model version that could not be loaded; the cause is for the operator."""


def process_memory_bytes() -> int:
    """Resident memory of this process, in bytes; 0 where the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Backend:
    """The engine and models of a device, created and used in the compute thread only.

    Attributes:
        free_memory: releases cached memory.
        memory_bytes: memory held on the device, in bytes.
    """

    registry: Registry
    engine: Engine
    free_memory: Callable[[], object]
    memory_bytes: Callable[[], int] = process_memory_bytes


class DeviceLost(Exception):
    """The device needs a new process."""


def classify_exception(error: BaseException) -> Fault:
    """Classify an exception of the engine by its type and text, without importing torch.

    Returns:
        `memory`: the device is out of memory and can be used again once some is freed.
        `device`: CUDA's other errors are sticky, so the process must be replaced (CUDA C++
            Programming Guide, "Error Checking": the context is corrupt and cannot be used).
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


def load_model(backend: Backend, spec: ModelSpec) -> ModelInfo | HeatlensError:
    """Load, verify and warm a model version, replacing the current one.

    Returns:
        The model, or the error with its cause as text. The original exception, whose traceback
        holds tensors, is dropped.

    Raises:
        DeviceLost: the device needs a new process.
    """
    try:
        return with_fingerprint(backend.registry.load(spec))
    except ModelLoadFailed as error:
        if error.__cause__ is not None:
            # Its cause is told in one line, with the place in the operator's code.
            log.debug("loading %s failed", spec.full_name, exc_info=True)
        return ModelLoadFailed(error.message, field=error.field, cause=cause_of(error))
    except HeatlensError as error:
        return error.alone()
    except Exception as error:
        fault = classify_exception(error)
        log.exception("loading %s failed: %s", spec.full_name, fault)
        if fault == "device":
            raise DeviceLost("device error") from None
        if fault == "memory":
            backend.free_memory()
            return ModelLoadFailed("The device has no memory for the model.")
        return ModelLoadFailed("The model could not be loaded; see the log of the service.")


def import_libraries(specs: Sequence[ModelSpec]) -> None:
    """Import what an engine that holds these models will, as far as it can be imported."""
    with _told():
        from models import engine, registry  # noqa: F401
        from models.preparation import openvino
        from models.sources import import_source

        for spec in specs:
            with _told():
                import_source(spec)
        if openvino.installed() and any(spec.runtime != "torch" for spec in specs):
            openvino.library()


@contextmanager
def _told() -> Iterator[None]:
    """Go on without a library that cannot be imported: the worker that needs it says what is wrong."""
    try:
        yield
    except Exception:
        log.debug("a library cannot be imported", exc_info=True)


def make_engine_backend(device: str, *, base_dir: Path, threads: int | None = None) -> Backend:
    """Make registry and engine; called in the thread that uses them, because it imports torch.

    Args:
        device: `cpu`, `cpu:N` (N only tells workers apart), `cuda` or `cuda:N`.
        base_dir: folder that relative paths of the catalog are resolved against.
        threads: torch threads of a CPU device; None leaves torch's own.
    """
    import torch

    from models.engine import Engine
    from models.registry import ModelRegistry

    if device.startswith("cpu"):
        if threads is not None:
            torch.set_num_threads(threads)
        registry = ModelRegistry("cpu", base_dir, proofs_dir=_proofs_dir())
        return Backend(registry=registry, engine=Engine(registry), free_memory=release_heap)
    torch.cuda.set_device(device)
    # float32 means float32: by default torch lets convolutions round to the 10 bits of TF32.
    torch.backends.cudnn.allow_tf32 = False
    registry = ModelRegistry(device, base_dir, proofs_dir=_proofs_dir())
    return Backend(
        registry=registry,
        engine=Engine(registry),
        free_memory=torch.cuda.empty_cache,
        memory_bytes=torch.cuda.memory_reserved,
    )


def _proofs_dir() -> Path | None:
    """Where proofs of models are kept from one start to the next, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "heatlens" / "proofs"
    except RuntimeError:
        # A user without a home keeps none.
        return None
