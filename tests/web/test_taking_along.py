"""What people take along: code that runs, pictures, the answer, a record that needs nothing else."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.web.asking import CAT, explained
from tests.web.conftest import SAMPLES

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.timeout(300)]


@pytest.fixture
def page(visit):
    page = visit(f"{CAT}&method=layercam&target=281&against=282")
    explained(page, "tabby")
    return page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the picture."""
    shutil.copy(SAMPLES / "cat.jpg", tmp_path)
    return tmp_path


def code(page, language: str) -> str:
    page.get_by_role("button", name="Copy as code").click()
    page.get_by_role("button", name=language, exact=True).click()
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_role("button", name="Copied").wait_for()
    return page.evaluate("() => navigator.clipboard.readText()")


def test_curl(page, folder: Path) -> None:
    command = code(page, "curl")
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, check=True)
    (explanation,) = json.loads(done.stdout)["results"][0]["explanations"]
    assert explanation["method"] == "layercam"
    assert explanation["target"]["label"] == "tabby"


def test_plain_requests_are_short_curl(visit) -> None:
    page = visit(CAT)
    explained(page)
    command = code(page, "curl")
    assert re.fullmatch(r"curl 'http://[\d.:]+/v1/explain' \\\n  -F 'image=@\"cat.jpg\"'", command)


def test_python(page, folder: Path) -> None:
    program = code(page, "Python")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "tabby" in done.stdout
    with Image.open(folder / "overlay.jpg") as overlay:
        assert overlay.size == (224, 224)


def test_javascript(page) -> None:
    program = code(page, "JavaScript").replace('querySelector("img")', 'querySelector("#here")')
    size = page.evaluate(
        "async () => {"
        "const file = await (await fetch('page/samples/cat.jpg')).blob();"
        "const image = document.createElement('img');"
        "image.id = 'here';"
        "document.body.append(image);"
        f"{program}\n"
        "await image.decode();"
        "return image.naturalWidth; }"
    )
    assert size == 224


def download(page, name: str) -> Path:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=name).click()
    return Path(waiting.value.path())


def test_picture(page) -> None:
    image = Image.open(download(page, "Download PNG"))
    original = Image.open(SAMPLES / "cat.jpg")
    assert (image.format, image.size) == ("PNG", original.size)
    centre = tuple(side // 2 for side in image.size)
    assert image.convert("RGB").getpixel(centre) != original.convert("RGB").getpixel(centre)


def test_answer(page) -> None:
    answer = json.loads(download(page, "Download JSON").read_text())
    assert answer["results"][0]["explanations"][0]["method"] == "layercam"


def test_record_needs_nothing_else(page, browser, tmp_path: Path) -> None:
    path = tmp_path / "record.html"
    path.write_bytes(download(page, "Download a one-page record").read_bytes())
    context = browser.new_context(offline=True)
    opened = context.new_page()
    requests: list[str] = []
    opened.on("request", lambda r: requests.append(r.url))
    opened.goto(path.as_uri())
    text = opened.locator("body").inner_text()
    assert "Why tabby and not tiger cat?" in text
    for part in ("LayerCAM", "efficientnet_lite0", "curl", "sample=cat"):
        assert part in text
    assert opened.locator("img").evaluate_all("all => all.every(i => i.naturalWidth > 0)")
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    pdf = opened.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1
    context.close()


def test_the_record_has_what_was_measured_of_this_map_alone(visit) -> None:
    page = visit(f"{CAT}&model=tiny&view=truth&truth=1")
    page.locator("#verdict").wait_for()
    measured = download(page, "Download a one-page record").read_text()
    assert "deletion " in measured
    assert measured.count("<svg") == 2
    page.get_by_role("tab", name="Look").click()
    page.get_by_label("Method").select_option("layercam")
    explained(page)
    other = download(page, "Download a one-page record").read_text()
    assert "deletion " not in other
    assert "<svg" not in other


def test_names_are_text_and_not_markup(visit, drop) -> None:
    buffer = io.BytesIO()
    Image.open(SAMPLES / "cat.jpg").save(buffer, "JPEG")
    page = visit()
    page.locator("#samples-list img").first.wait_for()
    drop(page, ("<img src=x onerror=alert(1)>'.jpg", buffer.getvalue()))
    explained(page)
    html = download(page, "Download a one-page record").read_text()
    assert "<img src=x" not in html
    assert "&lt;img src=x" in html
