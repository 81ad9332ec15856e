"""Records work as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from models.cuda.graphs import Work


class GraphRecorder:
    """Records CUDA graphs.

    All share one memory pool: a graph may write over what another has returned, so that only the
    last replay's tensors are good. Many graphs then take little more memory than the largest of
    them.
    """

    def __init__(self, device: torch.device) -> None:
        """Args: a CUDA device."""
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Run the work, so that libraries set themselves up, and record it.

        Raises:
            Exception: it waits for the device, or does something else that cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        stream, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(stream)
        # This context puts the stream back where the recording fails, which torch's own does not.
        with torch.cuda.stream(aside):
            work()
            with waiting_forbidden():
                work()
            outputs = self._record(graph, work, aside)
        stream.wait_stream(aside)

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay

    def _record(
        self, graph: torch.cuda.CUDAGraph, work: Work, stream: torch.cuda.Stream
    ) -> tuple[Tensor, ...]:
        try:
            # What other threads do on other devices meanwhile must not end the recording.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                return work()
        except Exception:
            # Torch would go on as if recording, and free nothing that two streams have used.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(stream.device_index, self._pool)  # noqa: SLF001
            raise


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Let operations that wait for the device fail, before they can spoil a recording."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # Torch warns that this mode does not know all such operations.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
