"""What the application is made of, and how routes get hold of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.api.body import InputReader
from service.api.limiter import ConcurrencyLimiter
from service.api.metrics import Metrics
from service.api.pipeline import Pipeline
from service.devices.pool import DevicePool
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Service:
    """One application's parts; made by `create_app`.

    Attributes:
        read_settings: reads the configuration as it is now; `settings` are those in force.
        limiter: counts the requests of each key; None = they are not limited.
    """

    settings: Settings
    read_settings: Callable[[], Settings]
    pool: DevicePool
    reader: InputReader
    pipeline: Pipeline
    metrics: Metrics
    limiter: ConcurrencyLimiter


async def get_service(request: Request) -> Service:
    """The parts of the application that answers a request."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]
