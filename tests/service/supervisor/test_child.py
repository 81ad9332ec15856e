"""Restart budgets and the description of exits."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from service.settings import WorkerSettings
from service.supervisor.child import Child, Command, RestartBudget, describe_exit
from service.supervisor.device_process import _without_keys


def test_the_budget_is_spent_and_comes_back():
    budget = RestartBudget(restarts=3, window_s=60)
    assert all(budget.pause_s(now, proven=False) is not None for now in (0, 1, 2))
    assert budget.pause_s(59, proven=False) is None
    assert budget.pause_s(60.5, proven=False) is not None
    assert RestartBudget(restarts=0, window_s=60).pause_s(0, proven=True) is None


def test_pauses_double_unless_the_process_had_proved_itself():
    budget = RestartBudget(restarts=1000, window_s=60)
    pauses = [budget.pause_s(n, proven=False) for n in range(12)]
    for n, pause in enumerate(pauses):
        longest = min(5.0, 0.1 * 2 ** (n + 1))
        assert longest / 2 <= pause <= longest
    assert budget.pause_s(13, proven=True) <= 0.1
    assert len(set(pauses)) == len(pauses), "no jitter"


def test_exits_are_named():
    assert describe_exit(0) == "exit 0"
    assert describe_exit(-signal.SIGSEGV) == "SIGSEGV"
    assert describe_exit(-250) == "signal 250"


@pytest.mark.process
def test_keys_do_not_reach_device_workers(monkeypatch, capfd):
    """A worker runs the code of a user's `python:` source, which may read its environment."""
    monkeypatch.setenv("HEATLENS_SECURITY__API_KEYS", "a secret")
    monkeypatch.setenv("HEATLENS_SECURITY", '{"admin_keys": ["a secret"]}')
    monkeypatch.setenv("HEATLENS_SERVER__PORT", "1")
    show = "import os; print({k: v for k, v in os.environ.items() if 'HEATLENS' in k})"
    child = Child(
        "worker", starter=Command([sys.executable, "-c", show]), settings=WorkerSettings()
    )
    child.start({}, now=time.monotonic(), environment=_without_keys())
    child._process.wait(20)
    assert child.reap() == 0
    assert capfd.readouterr().out.strip() == "{'HEATLENS_SERVER__PORT': '1'}"
