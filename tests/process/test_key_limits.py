"""The limit of a key holds for all HTTP processes together."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from configured import BASE
from fake_engine import Fault, image_of
from traffic import png

from tests.waiting import until

pytestmark = pytest.mark.process


def test_a_key_is_limited_across_processes(configured):
    running = configured(
        server={**BASE["server"], "http_workers": 3},
        limits={"max_concurrent_per_key": 3},
        security={"api_keys": ["one", "two"]},
    )
    until(lambda: len(list(running.service.runtime.key_counts_dir.iterdir())) == 3)

    def ask(number: int, key: str = "one") -> httpx.Response:
        return httpx.post(
            running.service.url("/v1/predict"),
            content=png(image_of(number, Fault.HOLD)),
            headers={"X-API-Key": key},
            timeout=30,
            trust_env=False,
        )

    def in_flight() -> int:
        text = httpx.get(running.service.url("/metrics"), trust_env=False).text
        return int(float(re.findall(r"^heatlens_inflight (.*)$", text, re.MULTILINE)[0])) - 1

    with ThreadPoolExecutor(4) as threads:
        first = []
        # One after the other: of two that arrive at the same moment both may be refused.
        for number in range(3):
            first.append(threads.submit(ask, number))
            until(lambda: in_flight() == len(first))
        refused = [ask(number).status_code for number in range(10, 20)]
        other = threads.submit(ask, 50, "two")
        until(lambda: in_flight() == 4)
        running.service.release()
        assert [request.result().status_code for request in first] == [200, 200, 200]
    assert refused == [429] * 10
    assert other.result().status_code == 200
    assert ask(60).status_code == 200
