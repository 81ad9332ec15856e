"""SIGHUP: a new configuration for a service that goes on answering; what is wrong with it changes nothing."""

from __future__ import annotations

import json
import os
import signal

import pytest
from configured import BASE, FAKE
from running import report, until

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
    assert not running.http_pids() & http
    assert len(running.http_pids()) == 2
    assert running.service.board().models == ("fake@2",)
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


def test_what_needs_a_restart_is_said(configured):
    running = configured()
    http = running.http_pids()
    server = {**BASE["server"], "devices": ["cpu:0", "cpu:1"]}
    running.reload(server=server)
    assert "server.devices has changed" in running.service.log
    assert [life.device for life in running.service.fleet.devices] == ["cpu"]
    assert running.http_pids() == http, "nothing that HTTP processes go by has changed"


def test_the_only_http_process_is_replaced_without_a_gap(configured):
    server = {**BASE["server"], "http_workers": 1}
    running = configured(server=server)
    with running.traffic(clients=6, pause_s=0.001) as traffic:
        before = running.http_pids()
        running.reload(server={**server, "grace_s": 6})
        assert not running.http_pids() & before
        traffic.after(10)
    assert traffic.errors == []
    assert traffic.statuses() == {200}
    assert not list(running.service.runtime.metrics_dir.glob(f"gauge_live*_{before.pop()}.db"))


def test_a_successor_that_does_not_start_leaves_the_old_one(configured):
    running = configured(server={**BASE["server"], "http_workers": 1})
    before = running.http_pids()
    running.write(limits={"max_images": 3})
    running.service.process.send_signal(signal.SIGHUP)
    until(lambda: len(running.http_pids()) == 2)
    (new,) = running.http_pids() - before
    os.kill(new, signal.SIGKILL)
    until(lambda: "a new HTTP process did not start to serve" in running.service.log)
    assert running.http_pids() == before
    assert running.ask(images=4).status_code == 200
    assert running.service.runtime.read_settings().limits.max_images == 32


@pytest.mark.anyio
async def test_a_new_process_knows_the_models_before_it_is_asked(service):
    """Otherwise the first requests to a successor would hear that models are still being loaded."""
    async with service.pool() as pool:
        (info,) = pool.models()
        assert info.card.ready
