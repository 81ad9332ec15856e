"""Forks as the supervisor sees them: their exits, signals to them, and the end of their server."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from service.supervisor.fork_server import ForkServer
from tests.waiting import until

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parent / "forks.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path.cwd())}


@contextlib.contextmanager
def serving(*, slow_s: float = 0.0):
    server = ForkServer([sys.executable, str(SCRIPT), str(slow_s)])
    try:
        yield server
    finally:
        server.kill()


def start(server, *arguments):
    return server.start(arguments, environment=ENVIRONMENT)


def runs(pid) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_exits_of_forks_are_told_apart(capfd):
    with serving() as server:
        forks = [start(server, *words) for words in (("exit", "3"), ("raise", "no"), ("exit", "0"))]
        assert [fork.wait() for fork in forks] == [3, 1, 0]
        assert len({fork.pid for fork in forks}) == 3
        assert server.is_running()
    assert "RuntimeError: no" in capfd.readouterr().err


def test_a_fork_has_the_environment_and_a_group_of_its_own(capfd):
    with serving() as server:
        fork = server.start(["print", "COLOUR"], environment=ENVIRONMENT | {"COLOUR": "blue"})
        assert fork.wait() == 0
    assert capfd.readouterr().out == "blue True\n"


def test_a_signal_reaches_one_fork_alone():
    with serving() as server:
        first, second = start(server, "sleep", "60"), start(server, "sleep", "60")
        until(lambda: second.poll() is None and second.pid)
        first.send_signal(signal.SIGTERM)
        assert first.wait() == -signal.SIGTERM
        first.send_signal(signal.SIGKILL)
        assert second.poll() is None
        assert runs(second.pid)
        second.kill()
        assert second.wait() == -signal.SIGKILL


def test_forks_end_with_their_server_and_the_next_one_starts_it_again():
    with serving() as server:
        forks = [start(server, "sleep", "60") for _ in range(2)]
        until(lambda: all(fork.poll() is None and fork.pid for fork in forks))
        os.kill(psutil.Process(forks[0].pid).ppid(), signal.SIGKILL)
        until(lambda: not server.is_running())
        assert [fork.wait() for fork in forks] == [-signal.SIGKILL] * 2
        until(lambda: not any(runs(fork.pid) for fork in forks))
        assert start(server, "exit", "5").wait() == 5


def test_a_fork_whose_turn_has_not_come_can_be_stopped():
    with serving(slow_s=60) as server:
        fork = start(server, "sleep", "60")
        assert fork.poll() is None
        assert fork.pid is None
        fork.send_signal(signal.SIGTERM)
        assert fork.wait() == -signal.SIGKILL
        assert not server.is_running()


def test_forks_leave_nothing_behind_when_the_supervisor_stops_asking():
    with serving() as server:
        fork = start(server, "sleep", "60")
        until(lambda: fork.poll() is None and fork.pid)
    until(lambda: not runs(fork.pid))
    assert fork.poll() == -signal.SIGKILL
