"""The parts of the application, and how routes get them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.api.admission import Admission
from service.api.body import BodyReader
from service.api.metrics import Metrics
from service.api.pipeline import Pipeline
from service.devices.pool import DevicePool
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of one application; made by `create_app`.

    Attributes:
        settings: the settings in force.
        read_settings: reads the configuration as it is now.
    """

    settings: Settings
    read_settings: Callable[[], Settings]
    pool: DevicePool
    reader: BodyReader
    pipeline: Pipeline
    metrics: Metrics
    admission: Admission


def service_of(request: Request) -> Service:
    """The parts of the application that answers a request.

    A plain call, for what answers requests for images: to solve a dependency, FastAPI takes longer
    than most dependencies do.
    """
    service: Service = request.app.state.service
    return service


async def get_service(request: Request) -> Service:
    """The same, as a dependency."""
    return service_of(request)


ServiceDep = Annotated[Service, Depends(get_service)]
