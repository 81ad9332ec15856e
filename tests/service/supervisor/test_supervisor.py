"""When a supervisor gives up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from service.settings import Settings
from service.supervisor.supervisor import Supervisor


def processes(*given_up: bool) -> list[SimpleNamespace]:
    return [SimpleNamespace(child=SimpleNamespace(given_up=each)) for each in given_up]


@pytest.mark.parametrize(
    ("devices", "http", "hopeless"),
    [
        ((False, True), (False, False), False),
        ((False, True), (True, False), False),
        ((True, True), (False, False), True),
        ((False, False), (True, True), True),
    ],
)
def test_the_service_stops_when_all_of_a_kind_are_given_up(devices, http, hopeless):
    """One HTTP process that an attack has worn out must not take the others with it."""
    supervisor = Supervisor(Settings())
    supervisor._devices, supervisor._http = processes(*devices), processes(*http)
    assert supervisor._is_hopeless() is hopeless
