"""The stages of the host benchmark do what an answer needs, and its floors the same bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.host import Row, servers_table, spread, stages_table
from benchmarks.host_stages import Picture, pictures_of, stages_of
from benchmarks.peers.minimal_server import resized
from service.cli.bench.requests import draw_images


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return pictures_of(draw_images(2))


def test_every_stage_runs_and_has_a_row(pictures: list[Picture]) -> None:
    stages = stages_of(pictures)
    seconds = {}
    for name, stage in stages.items():
        stage.ours()
        seconds[name] = 0.002
        if stage.floor is not None:
            stage.floor()
            seconds[f"{name}, floor"] = 0.001
    table = stages_table([seconds, seconds], stages)
    assert table.row_count == len(stages) + 1
    (*_, total) = table.columns[3].cells
    with_floor = sum(stage.floor is not None for stage in stages.values())
    assert total == spread([2 * len(stages) / with_floor] * 2)


def test_the_pictures_of_a_stage_are_those_of_an_answer(pictures: list[Picture]) -> None:
    heatmap = pictures[0].result.explanations
    assert heatmap
    assert heatmap[0].heatmap
    assert heatmap[0].heatmap.width == pictures[0].source.input.shape[1]


def test_the_minimal_server_sees_nearly_what_the_service_sees(pictures: list[Picture]) -> None:
    picture = pictures[0]
    spec = picture.plan.info.card.input
    assert spec is not None
    pixels = resized(picture.data, spec)
    assert pixels.shape == picture.source.input.shape
    # Half a pixel apart: where the crop lies is rounded by one of them only.
    assert np.corrcoef(pixels.ravel(), picture.source.input.ravel())[0, 1] > 0.97
    assert Image.open(io.BytesIO(picture.data)).size == (500, 375)


def test_a_table_of_servers_without_rounds_is_empty() -> None:
    assert servers_table({}).row_count == 0
    assert Row().ours == []
