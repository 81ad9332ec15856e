"""How pictures get into the page."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tests.web.asking import explained, links_to
from tests.web.conftest import NARROW, SAMPLES, WIDE

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.timeout(300)]


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_dropped(visit, drop, size, scheme) -> None:
    page = visit(size=size, scheme=scheme)
    page.get_by_role("heading", name="Why did the model say that?").wait_for()
    drop(page, SAMPLES / "cat.jpg")
    explained(page)
    assert page.locator("#welcome").is_hidden()


def test_pasted(visit) -> None:
    page = visit()
    page.locator("#samples-list img").first.wait_for()
    page.evaluate(
        """async () => {
          const blob = await (await fetch('page/samples/cat.jpg')).blob();
          const data = new DataTransfer();
          data.items.add(new File([blob], 'pasted.jpg', {type: 'image/jpeg'}));
          document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}));
        }"""
    )
    explained(page)


def test_chosen(visit) -> None:
    page = visit()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose pictures").click()
    chooser.value.set_files(SAMPLES / "coffee.jpg")
    explained(page, "espresso")


def test_photographed(visit) -> None:
    page = visit()
    page.get_by_role("button", name="Take a photograph").click()
    page.wait_for_function("() => document.querySelector('video')?.videoWidth > 0")
    page.get_by_role("button", name="Take the photograph").click()
    page.locator("#predictions .bar").first.wait_for()
    assert page.locator("video").count() == 0


def test_sample_and_its_link(visit) -> None:
    page = visit()
    page.get_by_role("button", name="A cat").click()
    explained(page)
    links_to(page, sample="cat")
    again = visit(page.url.partition("#")[2])
    explained(again)


def test_a_picture_that_the_browser_cannot_show(visit, drop) -> None:
    buffer = io.BytesIO()
    Image.open(SAMPLES / "cat.jpg").save(buffer, "TIFF")
    page = visit()
    page.locator("#samples-list img").first.wait_for()
    drop(page, ("cat.tiff", buffer.getvalue()))
    explained(page)
    page.wait_for_function("() => document.querySelector('#view-look .picture').naturalWidth > 0")


def test_a_new_picture(visit) -> None:
    page = visit("sample=cat")
    explained(page)
    page.get_by_role("button", name="New picture").click()
    page.get_by_role("heading", name="Why did the model say that?").wait_for()
    page.wait_for_url("**/")


def test_a_file_that_is_no_picture(visit, drop) -> None:
    page = visit(expect=["422"])
    page.locator("#samples-list img").first.wait_for()
    drop(page, ("broken.jpg", b"\xff\xd8\xff not a picture"))
    page.get_by_role("alert").get_by_text("save it as JPEG or PNG").wait_for()
