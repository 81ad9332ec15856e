"""One picture, looked at: classes, contrast, methods, colours, opacity, swipe, values, marks."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import pytest

from tests.web.asking import CAT, explained, labels, links_to, pixels, probabilities, until
from tests.web.conftest import NARROW, SAMPLES, WIDE

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.timeout(300)]


@pytest.fixture
def asked(visit):
    """Opens the cat and waits for its map."""

    def opened(state: str = CAT, **where):
        page = visit(state, **where)
        explained(page)
        return page

    return opened


def explain(server, **options) -> dict:
    """What the service answers about the cat by itself."""
    answer = httpx.post(
        f"{server.url}v1/explain",
        files={"image": (SAMPLES / "cat.jpg").read_bytes()},
        params={"outputs": "values", **options},
        timeout=60,
    )
    return answer.json()["results"][0]


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_predictions_are_bars(asked, server, size, scheme) -> None:
    page = asked(size=size, scheme=scheme)
    rows = explain(server)["predictions"]
    assert labels(page) == [row["label"] for row in rows]
    for bar, row in zip(page.locator("#predictions .rest").all(), rows, strict=True):
        track = bar.locator("xpath=..").bounding_box()
        width = (bar.bounding_box() or {"width": 0})["width"]
        assert width / track["width"] == pytest.approx(row["probability"], abs=0.02)
    page.get_by_role("button", name="Show 10").click()
    assert len(labels(page)) == 10


def test_a_class_is_explained_by_a_click_and_a_second_one_contrasted(asked) -> None:
    page = asked()
    first, second, third = labels(page)[:3]
    before = pixels(page)
    page.get_by_role("button", name=f"{second} ", exact=False).first.click()
    explained(page, second)
    assert page.locator("#question").inner_text() == f"Why {second}?"
    alone = pixels(page)
    assert alone != before
    page.get_by_role("button", name=f"…and not {third}").click()
    page.get_by_text(f"Why {second} and not {third}?").wait_for()
    until(page, lambda: pixels(page) != alone)
    assert page.locator("#question em").count() == 2
    page.get_by_role("button", name=f"…and not {third}").click()
    until(page, lambda: pixels(page) == alone)
    page.get_by_role("button", name="Back to the top class").click()
    explained(page, first)
    assert pixels(page) == before


def test_another_class_by_name(asked) -> None:
    page = asked()
    page.get_by_label("Explain another class").fill("tabby")
    page.get_by_label("Explain another class").press("Enter")
    explained(page, "tabby")
    page.get_by_label("Explain another class").fill("unicorn")
    page.get_by_label("Explain another class").press("Enter")
    assert page.locator("#other-class").evaluate("e => !e.validity.valid")
    assert page.locator("#question").inner_text() == "Why tabby?"


def test_another_method(asked, server) -> None:
    page = asked()
    before = pixels(page)
    page.get_by_label("Method").select_option("eigencam")
    until(page, lambda: pixels(page) != before)
    assert "arXiv:2008.00299" in page.locator("#asked").inner_text()
    links_to(page, sample="cat", method="eigencam")


def test_methods_that_do_not_fit_say_why(asked) -> None:
    page = asked()
    page.get_by_text("methods do not fit this model").click()
    assert "Attention Rollout" in page.locator(".unsupported").inner_text()
    assert page.locator("option[value=attention_rollout]").is_disabled()


def test_colours_and_opacity_need_no_request(asked) -> None:
    page = asked()
    requests = []
    page.on("request", lambda request: "/v1/" in request.url and requests.append(request.url))
    seen = pixels(page)
    page.get_by_role("combobox", name="Colours").select_option("viridis")
    assert pixels(page) != seen
    page.get_by_label("Opacity").fill("0")
    assert not any(pixels(page)[3::4])
    page.get_by_label("Opacity").fill("100")
    assert all(alpha == 255 for alpha in pixels(page)[3::4])
    assert not requests
    links_to(page, sample="cat", colormap="viridis", opacity="1")


def test_the_map_is_drawn_as_the_service_draws_it(asked, server) -> None:
    page = asked(f"{CAT}&opacity=1&colormap=gray")
    drawn = page.evaluate(
        """() => {
          const canvas = document.querySelector('#view-look .heat');
          const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          return [canvas.width, canvas.height, Array.from(all.filter((_, i) => i % 4 === 0))];
        }"""
    )
    width, height, levels = drawn
    from models.imaging.render import normalise, upsample

    values = explain(server)["explanations"][0]["values"]
    raw = np.frombuffer(base64.b64decode(values["data"]), "<f4").reshape(values["shape"])
    expected = normalise(upsample(raw, height=height, width=width), signed=False) * 255
    assert np.abs(np.reshape(levels, (height, width)) - expected).max() < 1.5


def test_swipe_with_pointer_and_keys(asked) -> None:
    page = asked()
    page.get_by_role("button", name="Swipe").click()
    handle = page.get_by_role("slider", name="Swipe between picture and heatmap")
    assert handle.get_attribute("aria-valuenow") == "50"
    handle.press("ArrowRight")
    assert handle.get_attribute("aria-valuenow") == "55"
    frame = page.locator("#view-look .frame").bounding_box()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] * 0.2, frame["y"] + 20)
    page.mouse.up()
    links_to(page, sample="cat", swipe="20")
    cover = page.locator("#view-look .cover")
    assert "20%" in cover.evaluate("e => getComputedStyle(e).clipPath")
    page.get_by_role("button", name="Swipe").click()
    assert handle.is_hidden()


def test_the_raw_value_under_the_pointer(asked, server) -> None:
    page = asked()
    result = explain(server)
    values, info = result["explanations"][0]["values"], result["image"]
    raw = np.frombuffer(base64.b64decode(values["data"]), "<f4").reshape(values["shape"])
    row, column = np.unravel_index(raw.argmax(), raw.shape)
    region = info["region"]
    x = (region["x"] + (column + 0.5) / raw.shape[1] * region["width"]) / info["width"]
    y = (region["y"] + (row + 0.5) / raw.shape[0] * region["height"]) / info["height"]
    frame = page.locator("#view-look .frame").bounding_box()
    page.mouse.move(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"])
    tip = page.locator("#view-look .tip")
    assert float(tip.inner_text()) == pytest.approx(float(raw.max()), rel=0.01)
    page.mouse.move(frame["x"] + 3, frame["y"] + 3)
    assert tip.is_hidden()


def test_values_by_keyboard(asked) -> None:
    page = asked()
    page.locator("#view-look .frame").focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_text("Row 4, column 3:").wait_for(state="attached")
    assert page.locator("#view-look .cell").is_visible()


def test_peak_and_box(asked, server) -> None:
    page = asked()
    assert page.locator("#view-look .marks rect").count() == 0
    page.get_by_role("button", name="Peak and box").click()
    box = explain(server)["explanations"][0]["box"]
    drawn = page.locator("#view-look .marks rect.over")
    assert {side: float(drawn.get_attribute(side)) for side in box} == box


def test_another_model(asked) -> None:
    page = asked()
    page.get_by_role("combobox", name="Model").select_option("tiny")
    until(page, lambda: set(labels(page)) == {"ant", "bee", "cat"})
    links_to(page, sample="cat", model="tiny")
    assert sum(probabilities(page)) == pytest.approx(100, abs=2)


def test_a_link_shows_the_same(asked, visit) -> None:
    page = asked(f"{CAT}&method=layercam&colormap=magma&opacity=0.6&marks=1&swipe=30&target=281")
    explained(page, "tabby")
    seen = pixels(page)
    links_to(
        page,
        sample="cat",
        method="layercam",
        colormap="magma",
        opacity="0.6",
        marks="1",
        swipe="30",
        target="281",
    )
    again = visit(page.url.partition("#")[2])
    explained(again, "tabby")
    assert pixels(again) == seen
    assert again.get_by_label("Method").input_value() == "layercam"


def test_back_and_forward(asked) -> None:
    page = asked()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#view-compare .card").first.wait_for()
    page.go_back()
    page.locator("#view-look .frame").wait_for()
    page.go_forward()
    page.locator("#view-compare .card").first.wait_for()


def test_tabs_by_keyboard(asked) -> None:
    page = asked()
    page.get_by_role("tab", name="Look").press("ArrowRight")
    assert page.get_by_role("tab", name="Compare").get_attribute("aria-selected") == "true"
    assert page.locator("#tab-compare:focus").count() == 1


def test_light_and_dark(visit) -> None:
    page = visit(scheme="dark")
    paper = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.get_by_role("button", name="Use light colours").click()
    light = page.evaluate(paper)
    assert light != dark
    page.reload()
    assert page.evaluate(paper) == light
