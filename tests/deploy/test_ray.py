"""Ray Serve: a local cluster answers as the plain service does, also when a replica is killed."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks import ray_serve
from benchmarks.fleet import START_S, Traffic, same
from benchmarks.servers import Server
from tests.deploy.test_nginx import TINY
from tests.waiting import until

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is missing"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    # The paths of pytest's own folders are too long for Ray's sockets.
    path = Path(tempfile.mkdtemp(prefix="hl", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def replicas(server: Server) -> set[int]:
    """Process ids of the replicas that are up."""
    found = psutil.Process(server.pid).children(recursive=True)
    return {process.pid for process in found if is_replica(process)}


def is_replica(process: psutil.Process) -> bool:
    try:
        return "ray::ServeReplica" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def until_two(server: Server, *, without: int = 0) -> None:
    """Wait for two replicas, not counting one that was killed."""
    until(lambda: len(replicas(server) - {without}) >= 2, timeout_s=START_S, every_s=0.2)


def test_a_cluster_answers_as_the_service_does_and_survives_a_kill(folder: Path) -> None:
    config = folder / "heatlens.toml"
    config.write_text(TINY)
    with ray_serve.plain(config, devices="cpu") as service:
        service.wait_ready(timeout_s=START_S)
        expected = ray_serve.answers_of(service)
    clients = 4
    with ray_serve.cluster(folder / "ray", config=config, replicas=2) as cluster:
        cluster.wait_ready(timeout_s=START_S)
        until_two(cluster)
        answers = ray_serve.answers_of(cluster)
        assert all(map(same, answers, expected))
        with Traffic(cluster.url(), expected).running(clients) as traffic:
            until(lambda: traffic.answers[200] >= 20 or traffic.failed, timeout_s=START_S)
            assert not traffic.failed, (traffic.answers, traffic.errors)
            victim = min(replicas(cluster))
            psutil.Process(victim).send_signal(signal.SIGKILL)
            until_two(cluster, without=victim)
            answered = traffic.answers[200]
            until(lambda: traffic.answers[200] >= answered + 20, timeout_s=START_S)
    assert traffic.wrong == 0
    # Ray does not try again what was on the wire to the replica that was killed.
    assert traffic.failed <= clients * 2, (traffic.answers, traffic.errors)
    assert not psutil.pid_exists(victim)
