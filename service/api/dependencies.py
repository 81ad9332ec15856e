"""The parts of the application, and the dependency through which routes get them."""

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
    """The parts of the application that answers a request."""
    service: Service = request.app.state.service
    return service


async def get_service(request: Request) -> Service:
    """The same, as a dependency."""
    return service_of(request)


ServiceDep = Annotated[Service, Depends(get_service)]


# FastAPI takes longer to solve a dependency than most of them take: those of each request for images
# have none of their own.
async def refuse_excess(request: Request) -> None:
    """Refuse a request for images while the service is at its limit; its body is not read."""
    service_of(request).admission.check_unread(request)
