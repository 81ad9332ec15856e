"""Compare, layers, and the gallery."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tests.web.asking import CAT, explained, labels, links_to, pixels, probabilities, until
from tests.web.conftest import NARROW, SAMPLES, WIDE

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.timeout(300)]


def drawn(page, selector: str) -> int:
    """How many maps a view shows."""
    return page.locator(f"{selector} .region:visible").count()


# ---------------------------------------------------------------- compare


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "dark"), (NARROW, "light")])
def test_methods_side_by_side_in_step(visit, size, scheme) -> None:
    page = visit(f"{CAT}&view=compare&items=gradcam,layercam", size=size, scheme=scheme)
    until(page, lambda: drawn(page, "#view-compare") == 2)
    first, second = ".compared .card:nth-child(1) .heat", ".compared .card:nth-child(2) .heat"
    before = pixels(page, first), pixels(page, second)
    page.get_by_label("Opacity").fill("90")
    page.get_by_role("combobox", name="Colours").select_option("magma")
    after = pixels(page, first), pixels(page, second)
    assert before[0] != after[0] != after[1] != before[1]
    page.get_by_role("button", name="Swipe").click()
    assert page.locator("#view-compare .handle:visible").count() == 2
    page.locator(".compared .frame").first.hover(position={"x": 150, "y": 100})
    assert page.locator("#view-compare .tip:visible").count() == 2


def test_choosing_what_is_compared(visit) -> None:
    page = visit(f"{CAT}&view=compare&items=gradcam")
    until(page, lambda: drawn(page, "#view-compare") == 1)
    page.get_by_text("1 of").click()
    page.get_by_role("button", name="HiResCAM").click()
    until(page, lambda: drawn(page, "#view-compare") == 2)
    links_to(page, sample="cat", view="compare", items="gradcam,hirescam")


@pytest.mark.parametrize(
    ("axis", "captions"),
    [("Layers", "bn2"), ("Models", "tiny"), ("Classes", "tiger cat")],
)
def test_other_comparisons(visit, axis: str, captions: str) -> None:
    page = visit(f"{CAT}&view=compare&items=gradcam")
    until(page, lambda: drawn(page, "#view-compare") == 1)
    page.get_by_role("button", name=axis, exact=True).click()
    until(page, lambda: drawn(page, "#view-compare") >= 2)
    page.locator("#view-compare figcaption b", has_text=captions).first.wait_for()


# ---------------------------------------------------------------- layers


def test_layer_tree_with_thumbnails(visit) -> None:
    page = visit(f"{CAT}&view=layers")
    until(page, lambda: page.locator(".tree img").first.evaluate("e => e.naturalWidth > 0"))
    assert page.locator(".layer[aria-pressed=true]").inner_text().startswith("bn2")
    page.get_by_role("button", name="Layers in blocks", exact=True).click()
    page.get_by_role("button", name="4", exact=False).locator("b", has_text="4").first.click()
    page.get_by_text("blocks.4", exact=False).first.wait_for()
    links_to(page, sample="cat", view="layers", layer="blocks.4")
    page.get_by_role("tab", name="Look").click()
    page.get_by_role("button", name="blocks.4").wait_for()
    assert page.get_by_role("button", name="classifier").count() == 0


def test_statistics_over_depth(visit) -> None:
    page = visit(f"{CAT}&view=layers")
    for title in ("Mean", "Spread", "exactly 0", "Dead channels"):
        page.locator(".chart figcaption", has_text=title).wait_for()
    path = page.locator(".chart .line").first.get_attribute("d")
    assert path.count("L") >= 5
    assert page.locator(".chart .marker circle").count() == 4


def test_a_channel_over_the_picture(visit) -> None:
    page = visit(f"{CAT}&view=layers")
    page.locator(".channel").first.wait_for()
    heat = "#view-layers .heat"
    until(page, lambda: drawn(page, "#view-layers") == 1)
    explanation = pixels(page, heat)
    page.locator(".channel").first.click()
    page.locator("#layer-title", has_text="Channel").wait_for()
    assert pixels(page, heat) != explanation
    page.locator(".channel[aria-pressed=true]").click()
    until(page, lambda: pixels(page, heat) == explanation)


def test_switching_channels_off_moves_the_bars(visit) -> None:
    page = visit(f"{CAT}&view=layers")
    page.locator(".switch").first.wait_for()
    explained(page)
    names, before = labels(page), probabilities(page)
    for i in range(3):
        page.locator(".switch").nth(i).click()
    until(page, lambda: page.locator("#predictions .change").count() > 0)
    until(page, lambda: "3 channels" in page.locator("#asked").inner_text())
    explained(page)
    assert labels(page)[: len(names)] == names
    assert probabilities(page)[:3] != before[:3]
    page.get_by_role("button", name="Switch on again").click()
    until(page, lambda: probabilities(page) == before)


# ---------------------------------------------------------------- gallery


def test_gallery_sorted_by_confidence(visit, drop) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), "grey").save(buffer, "JPEG")
    page = visit(expect=["422"])
    page.locator("#samples-list img").first.wait_for()
    files = [SAMPLES / "cat.jpg", SAMPLES / "coffee.jpg", ("grey.jpg", buffer.getvalue())]
    drop(page, *files, ("broken.jpg", b"\xff\xd8\xff"))
    page.get_by_role("tab", name="Gallery").wait_for()
    until(page, lambda: drawn(page, "#view-gallery") >= 2)
    page.get_by_text("save it as JPEG or PNG").first.wait_for()

    def sure() -> list[str]:
        return page.locator(".opener span").all_inner_texts()

    until(page, lambda: not any("Working" in text for text in sure()))
    shares = [float(text.split(", ")[-1].split()[0]) for text in sure() if text.endswith("%")]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    page.get_by_label("Sort").select_option("unsure")
    links_to(page, view="gallery", order="unsure")
    page.get_by_role("button", name="coffee.jpg").click()
    explained(page, "espresso")
    assert page.locator("#view-look").is_visible()
