"""Keys, errors in words, and a service that cannot be reached."""

from __future__ import annotations

import pytest

from tests.web.asking import CAT, explained

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.timeout(300)]


def test_a_key_is_asked_for_and_kept_in_memory_only(visit, other_server) -> None:
    with other_server(security={"api_keys": ["open-sesame"]}) as server:
        page = visit(CAT, at=server, expect=["401"])
        field = page.locator("#key")
        field.fill("wrong")
        field.press("Enter")
        page.get_by_text("That key is not known here.").wait_for()
        page.locator("#key").fill("open-sesame")
        page.get_by_role("button", name="Use this key").click()
        explained(page)
        kept = page.evaluate(
            """() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie,
                location.href])"""
        )
        assert "sesame" not in kept
        page.get_by_role("button", name="Copy as code").click()
        code = page.get_by_role("region", name="Code").inner_text()
        assert "$HEATLENS_KEY" in code
        assert "sesame" not in code
        page.reload()
        page.locator("#key").wait_for()


def test_without_a_key_the_page_says_what_to_do(visit, other_server) -> None:
    with other_server(security={"api_keys": ["open-sesame"]}) as server:
        page = visit(at=server, expect=["401"])
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("alert").get_by_text("Ask whoever runs the service for a key").wait_for()


def test_an_unknown_layer_in_a_link(visit) -> None:
    page = visit(f"{CAT}&layer=nope", expect=["404"])
    page.get_by_role("alert").get_by_text("Choose another layer").wait_for()
    page.get_by_role("button", name="Use recommended").click()
    explained(page)
    assert page.get_by_role("alert").count() == 0


def test_a_service_that_is_gone_and_back(visit) -> None:
    page = visit(CAT, expect=["ERR_INTERNET_DISCONNECTED"])
    explained(page)
    page.context.set_offline(True)
    page.get_by_label("Method").select_option("layercam")
    page.get_by_role("alert").get_by_text("Check that it is running").wait_for()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("alert").wait_for(state="hidden")
    explained(page)
