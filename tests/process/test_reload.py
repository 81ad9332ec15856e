"""SIGHUP: a running service adopts a new configuration, and keeps the old one if that is wrong."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from configured import BASE, FAKE
from fake_engine import Fault, image_of
from running import report
from traffic import png

from tests.waiting import until

pytestmark = pytest.mark.process


def test_models_keys_and_limits_change_without_a_dropped_request(configured):
    running = configured()
    worker, http = running.service.worker_pid(), running.http_pids()
    assert len(http) == 2
    second = {**FAKE, "version": "2", "source": "python:fake.slow"}
    security = {"api_keys": ["one", "two"], "admin_keys": ["admin"]}
    with running.traffic() as traffic:
        traffic.after(20)
        running.reload(models=[FAKE, second], security=security, limits={"max_images": 1})
        traffic.after(20)
        versions = [answer.json()["model"]["version"] for answer in traffic.answers]
        assert running.ask(key="two").json()["model"]["version"] == "2"
        assert running.ask(model="fake@1").json()["model"]["version"] == "1"
        assert running.ask(images=2).json()["code"] == "too_many_images"
        running.reload(models=[second], security={"api_keys": ["one"]})
        traffic.after(20)
    assert traffic.errors == []
    assert traffic.statuses() == {200}
    first_new = versions.index("2")
    report(f"{len(traffic.answers)} answers, the first by the new version after {first_new}")
    assert running.ask(key="two").json()["code"] == "unauthorized"
    assert running.ask(model="fake@1").status_code in {404, 503}
    assert running.ask(images=2).status_code == 200
    assert running.service.worker_pid() == worker
    assert running.http_pids() == http, "a reload swaps the application, not the process"
    assert running.service.status().models == ("fake@2",)
    logs = list(map(json.loads, running.service.log.splitlines()))
    assert not [line for line in logs if line["level"] == "error"]


def test_a_wrong_file_changes_nothing(configured):
    running = configured()
    http = running.http_pids()
    running.file.write_text("[server]\nprot = 8000\n")
    running.hangup("the configuration is wrong, the old one stays")
    assert "server.prot: unknown key" in running.service.log
    running.file.unlink()
    running.hangup("the configuration is wrong, the old one stays")
    assert running.http_pids() == http
    assert running.ask().status_code == 200


def test_a_model_that_cannot_be_loaded_stops_the_reload(configured):
    running = configured()
    http = running.http_pids()
    broken = {"name": "broken", "source": "python:fake.broken"}
    running.reload(
        until_log="the configuration is not reloaded, the old one stays",
        models=[broken],
        security={"api_keys": ["two"]},
    )
    assert "broken@1 was not loaded" in running.service.log
    assert running.http_pids() == http
    assert running.ask().status_code == 200, "the old keys, and the old model"
    running.reload(models=[{**FAKE, "version": "2"}])
    assert running.ask().json()["model"]["version"] == "2", "a later reload goes through"


def test_changes_that_need_a_restart_are_logged(configured):
    running = configured()
    http = running.http_pids()
    server = {**BASE["server"], "devices": ["cpu:0", "cpu:1"]}
    running.reload(server=server)
    assert "server.devices has changed" in running.service.log
    assert [state.device for state in running.service.states.devices] == ["cpu"]
    assert running.http_pids() == http, "nothing that HTTP processes go by has changed"


def test_every_process_swaps_without_closing_a_connection(configured):
    running = configured(server={**BASE["server"], "http_workers": 3})
    with running.traffic(clients=12, pause_s=0.001) as traffic:
        traffic.after(20)
        running.reload(limits={"max_images": 1})
        assert {running.ask(images=2).json().get("code") for _ in range(30)} == {"too_many_images"}
        traffic.after(20)
    assert traffic.errors == []
    assert traffic.statuses() == {200}
    assert traffic.connections == 12


def test_no_model_goes_while_a_request_by_the_old_configuration_runs(configured):
    """The default model of the old configuration serves requests that began under it."""
    other = {"name": "other", "source": "python:fake.fast"}
    running = configured(models=[FAKE, other], default_model="fake")
    slow = png(image_of(1, Fault.SLOW, 50))
    with ThreadPoolExecutor() as threads:
        request = threads.submit(running.ask, content=slow)
        until(lambda: running.service.status().jobs)
        running.reload(models=[other], default_model="other")
        assert request.done(), "the reload is complete before its last request by the old one"
        assert request.result().json()["model"]["name"] == "fake"
    assert running.ask().json()["model"]["name"] == "other"


def test_a_process_that_exits_during_a_reload_leaves_the_old_configuration(configured):
    running = configured()
    slow = {"name": "slow", "source": "python:fake.slow"}
    before = running.http_pids()
    running.write(models=[FAKE, slow], security={"api_keys": ["two"]})
    running.service.process.send_signal(signal.SIGHUP)
    until(lambda: "reloading the configuration" in running.service.log)
    (leader,) = {line["process"] for line in running.logs("reloading the configuration")}
    os.kill(leader, signal.SIGKILL)
    until(lambda: leader not in running.http_pids() and len(running.http_pids()) == 2)
    assert running.http_pids() != before
    until(running.is_ready)
    assert running.ask().status_code == 200, "the old keys"
    running.hangup("the configuration is reloaded")
    assert running.ask(key="two", model="slow").status_code == 200
    assert running.ask().status_code == 401


def test_two_signals_at_once_end_with_the_newest_file(configured):
    running = configured()
    running.write(limits={"max_images": 2})
    running.service.process.send_signal(signal.SIGHUP)
    until(lambda: "reloading the configuration" in running.service.log)
    running.write(limits={"max_images": 3})
    running.hangup("the configuration is reloaded")
    until(lambda: running.ask(images=3).status_code == 200)
    assert running.ask(images=4).json()["code"] == "too_many_images"


def test_a_signal_before_the_processes_serve_is_not_lost(start_configured):
    running = start_configured(models=[FAKE])
    running.service.wait_listening()
    running.write(limits={"max_images": 2})
    running.service.process.send_signal(signal.SIGHUP)
    until(lambda: "the configuration is reloaded" in running.service.log, timeout_s=60)
    assert running.ask(images=3).json()["code"] == "too_many_images"


@pytest.mark.anyio
async def test_a_new_process_knows_the_models_before_it_is_asked(service):
    """Otherwise the first requests to a successor fail because models are still being loaded."""
    async with service.pool() as pool:
        (info,) = pool.models()
        assert info.card.ready
