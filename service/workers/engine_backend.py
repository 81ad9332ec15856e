"""The real engine on a device. The only door by which torch comes into the service."""

from __future__ import annotations

import gc
from pathlib import Path

from service.workers.backend import Backend


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
