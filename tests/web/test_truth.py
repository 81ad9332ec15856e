"""Whether a map is faithful, and long methods: progress, partial maps, cancelling."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from tests.web.asking import CAT, explained, pixels, until
from tests.web.conftest import NARROW, WIDE

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.timeout(300)]

# What is tried here does not depend on what the network knows.
TINY = f"{CAT}&model=tiny"


@pytest.fixture
def deleted(server) -> Callable[..., float]:
    """Share of the shown input that has the mean colour of the model."""
    card = httpx.get(f"{server.url}v1/models/tiny", timeout=60).json()
    mean = [round(255 * shade) for shade in card["input"]["mean"]]

    def share(page) -> float:
        shown = pixels(page, "#deleted")
        dots = [shown[i : i + 3] for i in range(0, len(shown), 4)]
        return sum(dot == mean for dot in dots) / len(dots)

    return share


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_curves_beside_chance_and_the_picture_as_it_is_deleted(
    visit, deleted, size, scheme
) -> None:
    page = visit(f"{TINY}&view=truth", size=size, scheme=scheme)
    page.set_default_timeout(60_000)
    explained(page)
    page.get_by_role("button", name="Measure it").click()
    page.locator("#verdict").wait_for()
    assert page.locator("#verdict").inner_text().startswith(("Yes", "Partly", "No"))
    assert page.locator("#view-truth .line.map").count() == 2
    assert page.locator("#view-truth .line.random").count() == 2
    assert page.locator(".measures tbody tr").count() == 5
    assert deleted(page) < 0.02
    page.get_by_label("Share of pixels deleted").fill("50")
    assert deleted(page) == pytest.approx(0.5, abs=0.05)
    page.get_by_text("50 % deleted").wait_for()
    page.get_by_label("Share of pixels deleted").fill("0")
    page.get_by_role("button", name="Play").click()
    until(page, lambda: deleted(page) > 0.1)


def test_a_measured_link_measures_again(visit) -> None:
    page = visit(f"{TINY}&view=truth&truth=1&share=0.3")
    page.locator("#verdict").wait_for(timeout=60_000)
    page.get_by_text("30 % deleted").wait_for()


def test_a_long_method_shows_progress_and_maps_on_the_way_and_can_be_cancelled(visit) -> None:
    page = visit(CAT)
    explained(page)
    gradcam = pixels(page)
    # So many that even a fast machine is at it for seconds, and a slow one is not asked for too much.
    page = visit(f"{CAT}&method=rise&samples=1000")
    page.get_by_role("group", name="Progress").wait_for()
    page.locator("#far", has_text="RISE").wait_for()
    assert page.locator("#far").inner_text().split(" of ")[1].startswith("1,000")
    until(page, lambda: "left" in page.locator("#far").inner_text())
    page.get_by_text("A map of the samples so far.").wait_for()
    until(page, lambda: pixels(page) != gradcam)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("group", name="Progress").wait_for(state="hidden")
    # The device is free for the next question.
    page.get_by_label("Method").select_option("gradcam")
    until(page, lambda: pixels(page) == gradcam)


def test_few_samples_end(visit) -> None:
    page = visit(f"{TINY}&method=rise&samples=40")
    explained(page)
    assert page.get_by_label("Samples").input_value() == "40"
    page.get_by_label("Samples").fill("60")
    page.get_by_label("Samples").press("Enter")
    explained(page)
    assert page.get_by_text("samples so far").count() == 0


def test_a_comparison_can_be_cancelled(visit) -> None:
    page = visit(f"{CAT}&view=compare&items=gradcam,rise&samples=1000")
    page.locator("#far", has_text="RISE").wait_for()
    assert page.locator("#far").inner_text().split(" of ")[1].startswith("1,000")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("group", name="Progress").wait_for(state="hidden")
    page.locator("figcaption", has_text="RISE").get_by_text("Cancelled").wait_for()
    assert page.locator("#view-compare .region:visible").count() == 1
