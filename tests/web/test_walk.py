"""The walk of docs/page.md: ten questions about one picture, each answered by looking."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.web.asking import CAT, explained, labels, pixels, probabilities, until
from tests.web.conftest import SAMPLES

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.timeout(300)]

WRITTEN = (Path(__file__).parents[2] / "docs" / "page.md").read_text()


def test_every_question_is_here() -> None:
    questions = re.findall(r"^### (\d+)\. ", WRITTEN, re.MULTILINE)
    here = re.findall(r"^def test_(\d+)_", Path(__file__).read_text(), re.MULTILINE)
    assert questions == here == [str(i) for i in range(1, 11)]


def test_1_what_does_the_model_see(visit, drop) -> None:
    page = visit()
    page.locator("#samples-list img").first.wait_for()
    drop(page, SAMPLES / "cat.jpg")
    explained(page, "Egyptian cat")
    assert {"Egyptian cat", "tiger cat", "tabby"} <= set(labels(page)[:4])


def test_2_where_did_it_look(visit) -> None:
    page = visit(CAT)
    explained(page)
    page.get_by_role("button", name="Peak and box").click()
    frame = page.locator("#view-look .frame").bounding_box()
    box = page.locator("#view-look .marks rect.over").bounding_box()
    assert 0.05 < box["width"] * box["height"] / (frame["width"] * frame["height"]) < 0.6


def test_3_what_lies_under_the_heat(visit) -> None:
    page = visit(CAT)
    explained(page)
    page.get_by_role("button", name="Swipe").click()
    page.get_by_role("slider", name="Swipe").press("End")
    clip = page.locator("#view-look .cover").evaluate("e => getComputedStyle(e).clipPath")
    assert "100%" in clip


def test_4_how_strong_is_it_there(visit) -> None:
    page = visit(CAT)
    explained(page)
    page.locator("#view-look .frame").hover()
    value = float(page.locator("#view-look .tip").inner_text())
    low, high = (float(page.locator(end).inner_text()) for end in ("#lowest", "#highest"))
    assert low <= value <= high


def test_5_where_would_it_look_for_another_class(visit) -> None:
    page = visit(CAT)
    explained(page)
    before = pixels(page)
    page.locator("#predictions .bar", has_text="tabby").click()
    explained(page, "tabby")
    assert pixels(page) != before


def test_6_why_this_and_not_that(visit) -> None:
    page = visit(CAT)
    explained(page)
    before = pixels(page)
    page.get_by_role("button", name="…and not tiger cat").click()
    page.get_by_text("Why Egyptian cat and not tiger cat?").wait_for()
    until(page, lambda: pixels(page) != before)


def test_7_do_other_methods_agree(visit) -> None:
    page = visit(CAT)
    explained(page)
    page.get_by_role("tab", name="Compare").click()
    until(page, lambda: page.locator("#view-compare .region:visible").count() == 4, seconds=60)


def test_8_how_did_the_network_get_there(visit) -> None:
    page = visit(f"{CAT}&view=layers&layer=blocks.2")
    page.locator("#layers-charts .marker circle").first.wait_for()
    page.locator("#layer-title", has_text="blocks.2").wait_for()
    until(page, lambda: page.locator("#view-layers .region:visible").count() == 1)


def test_9_which_feature_maps_carry_the_answer(visit) -> None:
    page = visit(f"{CAT}&view=layers")
    page.locator(".switch").first.wait_for()
    explained(page)
    before = probabilities(page)
    page.locator(".switch").first.click()
    until(page, lambda: page.locator("#predictions .change").count() > 0)
    assert probabilities(page) != before


def test_10_is_it_true(visit) -> None:
    page = visit(f"{CAT}&view=truth")
    page.get_by_role("button", name="Measure it").click()
    page.locator("#verdict", has_text="Without its first 10 % of pixels").wait_for(timeout=60_000)
