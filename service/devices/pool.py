"""The seam between HTTP and devices: `DevicePool`, and a fake one for tests of the API.

Three implementations: `client.SocketPool` (the service), `local.LocalPool` (in this process:
notebooks, replicas of other serving frameworks, the command line), and `FakePool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from models.catalog import ModelSpec
from models.types import Job, ModelInfo, Outcome, Struct
from service.devices.status import BatchCount


class DeviceStatus(Struct):
    """What readiness says of one device.

    Attributes:
        state: `starting` | `ready` | `lost` | `draining`.
        last_pass_s: seconds since the device last completed a real pass; None if it never did.
        queue_depth: jobs waiting or running there.
        wait_ms: estimated wait of a new job in device-milliseconds.
        models: models that are warm on it, as `name@version`.
        restarts: times its worker was restarted.
        restart_reasons: the same by why it had ended; see `DeviceState`.
        memory_bytes: memory that its worker holds there.
        batches: what the worker has run since it started.
    """

    device: str
    state: str
    last_pass_s: float | None = None
    queue_depth: int = 0
    wait_ms: float = 0.0
    models: tuple[str, ...] = ()
    restarts: int = 0
    restart_reasons: dict[str, int] = {}
    memory_bytes: int = 0
    batches: tuple[BatchCount, ...] = ()


class DevicePool(Protocol):
    """Runs jobs on devices."""

    async def start(self) -> None:
        """Connect; returns before any device is ready."""
        ...

    async def close(self) -> None:
        """Refuse new jobs, fail the outstanding ones with `Draining`, release everything."""
        ...

    async def submit(self, job: Job) -> Outcome:
        """Run one job and return its outcome.

        Cancelling the awaiting task cancels the job.

        Raises:
            HeatlensError: the job's typed failure: `Overloaded`, `DeadlineExceeded`, `NotReady`,
                `Draining`, `WorkerLost`, `InputQuarantined`, `UnknownModel`, or what the engine
                found wrong.
        """
        ...

    def models(self) -> Sequence[ModelInfo]:
        """Every configured model version, the unavailable ones with their reason; devices merged."""
        ...

    def devices(self) -> Sequence[DeviceStatus]:
        """Every configured device."""
        ...

    async def load(self, spec: ModelSpec) -> None:
        """Load or replace a model version on its devices, warm, before it answers anything."""
        ...

    async def unload(self, name: str, version: str | None = None) -> None:
        """Let a model (version) finish its jobs, then drop it."""
        ...
