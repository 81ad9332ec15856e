"""nginx before two services: what a user copies, run for real."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from benchmarks import fleet
from service.settings import Settings

TINY = """
[workers]
threads = 1
[[models]]
name = "tiny"
source = "timm:resnet10t"
weights = "none"
num_classes = 10
[models.preprocess]
resize = 72
crop = 64
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed (make fleet)")
def test_neither_a_drain_nor_a_kill_costs_a_request(tmp_path: Path) -> None:
    config = tmp_path / "heatlens.toml"
    config.write_text(TINY)
    clients = 4
    drained, killed = fleet.drive(config, clients=clients, pause_s=1.5)
    for phase in (drained, killed):
        assert phase.failed == 0, (phase.answers, phase.errors)
        assert phase.answers[200] > 2 * clients
    assert killed.tried_again <= clients, "no more than was on the wire"


def test_limits_of_nginx_are_those_of_the_service() -> None:
    text = fleet.CONFIG.read_text()
    limits = Settings().limits
    assert f"client_max_body_size {limits.max_body_mb:.0f}m;" in text
    (wait_s,) = re.findall(r"proxy_read_timeout (\d+)s;", text)
    assert int(wait_s) > limits.max_timeout_s
