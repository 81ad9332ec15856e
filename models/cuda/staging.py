"""From the host to a device, without waiting for the device or keeping it from its work."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("heatlens.engine")

Ready = Callable[[], Tensor]
"""Gives a batch that is on its way, on the device; users there wait."""


class Uploads(Protocol):
    """How images reach a device."""

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of the host, from which the device copies by itself."""
        ...

    def start(self, host: Tensor) -> Ready:
        """Start the copy of such memory, which nobody writes to any more."""
        ...


class CopyStream:
    """Uploads on a stream of their own.

    Torch reuses its page-locked memory when the copies from it have ended, so that one part of a
    batch can be stacked while another is still being copied. The next batch is not uploaded ahead:
    forming it earlier would cost more than the upload of 2.4 MB that it would hide.
    """

    def __init__(self, device: torch.device) -> None:
        """Args: a CUDA device."""
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return page-locked memory."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def start(self, host: Tensor) -> Ready:
        """Start the copy; the stream that is current when the result is called waits for it."""
        with torch.cuda.stream(self._stream):
            images = host.to(self._device, non_blocking=True)
            copied = self._stream.record_event()

        def ready() -> Tensor:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            # The memory belongs to the copying stream, which must not reuse it before it is read.
            images.record_stream(stream)
            return images

        return ready


class CarefulUploads:
    """Uploads by another way until that fails; from then on batches are copied when they run.

    Args:
        uploads: the other way.
    """

    def __init__(self, uploads: Uploads) -> None:
        self._uploads: Uploads | None = uploads

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of the host, page-locked where that works."""
        if self._uploads is not None:
            try:
                return self._uploads.memory(shape, dtype)
            except RuntimeError as error:
                self._give_up(error)
        return torch.empty(tuple(shape), dtype=dtype)

    def start(self, host: Tensor) -> Ready:
        """Start the copy, or leave the batch on the host for its pass to copy."""
        if self._uploads is None:
            return lambda: host
        try:
            ready = self._uploads.start(host)
        except RuntimeError as error:
            self._give_up(error)
            return lambda: host

        def arrived() -> Tensor:
            try:
                return ready()
            except RuntimeError as error:
                self._give_up(error)
                return host

        return arrived

    def _give_up(self, error: RuntimeError) -> None:
        # Where the device itself has failed, the pass fails as well and says so.
        reason = "uploads on a stream of their own failed; the model runs without"
        logger.error(reason, exc_info=error)
        self._uploads = None


def stage(images: Sequence[np.ndarray], uploads: Uploads | None) -> Ready:
    """Stack arrays of one shape and start their upload; without `uploads` they stay here."""
    arrays = [torch.from_numpy(image) for image in images]
    if uploads is None:
        return lambda: torch.stack(arrays)
    host = uploads.memory((len(arrays), *arrays[0].shape), arrays[0].dtype)
    torch.stack(arrays, out=host)
    return uploads.start(host)


def indices(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers as an int64 tensor on a device that is not waited for."""
    # Torch's own constructor takes several times as long.
    made = torch.from_numpy(np.array(values, dtype=np.int64))
    if device.type == "cuda":
        try:
            return made.pin_memory().to(device, non_blocking=True)
        except RuntimeError:
            warn_unlocked()
    return made.to(device)


def warn_unlocked() -> None:
    """Warn that the device is waited for, because the host has no page-locked memory."""
    warnings.warn("There is no page-locked memory: copies wait for the device.", stacklevel=2)
