"""How long a job will take, from the times of its steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.types import Progress
from service.worker.pace import Pace


class Counting:
    """A job of many steps."""

    def __init__(self, total: int) -> None:
        self.job = type("Named", (), {"id": "j"})
        self.done, self.total, self.shown = 0, total, 0

    def progress(self, *, maps: bool) -> Progress:
        self.shown += maps
        return Progress(what="rise", done=self.done, total=self.total)


@given(st.floats(0.001, 5.0), st.integers(1, 16))
def test_a_steady_pace_is_known_from_the_first_step_on(step_s, images):
    job, pace, now = Counting(40 * images), Pace(100.0), 100.0
    assert pace.news(job, wanted="progress", now=now).seconds_left is None
    for left in range(39, 0, -1):
        now += step_s
        job.done += images
        news = pace.news(job, wanted="progress", now=now)
        if news is not None:
            assert news.seconds_left == pytest.approx(left * step_s, rel=0.01)


def test_the_pace_follows_a_device_that_becomes_busy():
    job, pace, now, news = Counting(10_000), Pace(0.0), 0.0, None
    for step_s in [0.02] * 1000 + [0.08] * 400:
        now += step_s
        job.done += 4
        news = pace.news(job, wanted="progress", now=now) or news
    # 32 s later the estimate is that of the new pace.
    assert news.seconds_left == pytest.approx((10_000 - news.progress.done) / 4 * 0.08, rel=0.25)


def test_news_come_at_most_every_200_ms_and_maps_every_second():
    job, pace, told = Counting(10_000), Pace(0.0), 0
    for i in range(1000):
        job.done += 1
        told += pace.news(job, wanted="maps", now=i / 100) is not None
    assert 45 <= told <= 50
    assert 9 <= job.shown <= 10
