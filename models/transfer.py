"""Between host and device without needless waiting: whoever waits for a device lets it run out of work."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)


def fetch(tensors: Mapping[K, Tensor]) -> dict[K, np.ndarray]:
    """Bring tensors to the host: all that are elsewhere in one transfer, with one wait for the device.

    Args:
        tensors: on any device, of any dtype that numpy knows.

    Returns:
        An array of the same shape and dtype for each; of tensors that are on the host already, a
        view.
    """
    arrays = {key: t.detach().numpy() for key, t in tensors.items() if _on_host(t)}
    # The widest first, so that every array begins at a multiple of its item's size.
    away = sorted(tensors.keys() - arrays.keys(), key=lambda key: -tensors[key].element_size())
    if not away:
        return arrays
    packed = torch.cat([tensors[key].detach().reshape(-1).view(torch.uint8) for key in away])
    data, start = _to_host(packed), 0
    for key in away:
        tensor = tensors[key]
        end = start + tensor.numel() * tensor.element_size()
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        arrays[key] = data[start:end].view(dtype).reshape(tensor.shape)
        start = end
    return arrays


def indices(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers as an int64 tensor on a device that is not waited for."""
    made = torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _to_host(packed: Tensor) -> np.ndarray:
    """Copy bytes of a CUDA device by way of page-locked memory, which torch keeps and gives out again."""
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).record_event().synchronize()
    # A copy: an answer that is kept must not keep page-locked memory.
    return host.numpy().copy()
