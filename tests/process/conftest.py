"""A service to break: real supervisor and workers, with a fake engine and a small HTTP process."""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake_engine
from configured import Configured, configured_services
from running import Service

from models.types import Job, JobOptions
from service.devices.messages import Submission
from service.settings import Settings
from tests.waiting import until


@pytest.fixture
def start_service() -> Iterator[Callable[..., Service]]:
    # The paths of pytest's own folders are too long for sockets.
    folder = Path(tempfile.mkdtemp(prefix="hl-", dir="/tmp"))
    started: list[Service] = []

    def start(
        *flags: str, workers: dict | None = None, models: list | None = None, **server
    ) -> Service:
        settings = Settings(
            server={"port": 0, "devices": ["cpu"], "http_workers": 1, "grace_s": 5.0, **server},
            workers={"canary_s": 0.3, "hang_floor_s": 1.0, "hang_factor": 10, **(workers or {})},
            models=models or [fake_engine.spec()],
        )
        started.append(Service(settings, folder, *flags))
        started[-1].wait_listening()
        return started[-1]

    try:
        yield start
    finally:
        for service in started:
            service.stop()
        shutil.rmtree(folder)


@pytest.fixture
def configured() -> Iterator[Callable[..., Configured]]:
    """Starts services with real HTTP processes and a configuration file."""
    with configured_services() as start:
        yield start


@pytest.fixture
def start_configured(configured) -> Callable[..., Configured]:
    """The same, without waiting until they are ready."""
    return functools.partial(configured, wait=False)


@pytest.fixture
def service(start_service) -> Service:
    """One device, ready."""
    running = start_service()
    until(running.is_ready)
    return running


@pytest.fixture
def make_job() -> Callable[..., Submission]:
    def make(number: int, fault=fake_engine.Fault.NONE, argument: int = 0, **changes) -> Submission:
        pixels = fake_engine.image_of(number, fault, argument)
        job = Job(
            id=uuid.uuid4().hex,
            operation="predict",
            model="fake",
            version="1",
            input=pixels,
            options=JobOptions(),
        )
        envelope = {name: changes.pop(name) for name in ("deadline",) if name in changes}
        return Submission(
            job=msgspec.structs.replace(job, **changes),
            digest=f"digest-{number}",
            **{"deadline": time.monotonic() + 20, **envelope},
        )

    return make
