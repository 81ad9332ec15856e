"""The front end of `examples/`, from another origin than the service."""

from __future__ import annotations

import pytest

from tests.web.conftest import SAMPLES

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.timeout(300)]


@pytest.fixture
def page(browser, server, elsewhere):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(f"{elsewhere}/?service={server.url.rstrip('/')}")
    yield page
    context.close()


def test_the_map_is_laid_over_the_picture(page) -> None:
    page.set_input_files("#file", SAMPLES / "cat.jpg")
    page.wait_for_function("() => heat.complete && heat.naturalWidth > 0 && !heat.hidden")
    assert page.locator("#heat").bounding_box() == page.locator("#image").bounding_box()
    assert page.locator("#label").inner_text().endswith("%")
    assert "cat" in page.locator("#heat").get_attribute("alt")
    page.locator("#opacity").fill("0.2")
    assert page.locator("#heat").evaluate("heat => heat.style.opacity") == "0.2"


def test_what_the_service_says_of_a_bad_picture_is_shown(page) -> None:
    bad = {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"}
    page.set_input_files("#file", files=[bad])
    page.get_by_text("format").wait_for()
    assert page.locator("#heat").is_hidden()
