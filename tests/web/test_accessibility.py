"""axe-core finds nothing to say about any view, at two widths and in both colour schemes."""

from __future__ import annotations

import pytest

from tests.web.asking import CAT, explained
from tests.web.conftest import AXE, NARROW, WIDE

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.timeout(300)]

VIEWS = {
    "welcome": ("", "#samples-list img"),
    "look": (
        f"{CAT}&swipe=40&marks=1&method=rise&samples=20&model=tiny&against=2",
        "#view-look .heat",
    ),
    "compare": (f"{CAT}&view=compare&items=gradcam,layercam", "#view-compare .heat"),
    "layers": (f"{CAT}&view=layers&off=bn2:112", "#layers-charts .chart"),
    "truth": (f"{CAT}&model=tiny&view=truth&truth=1&share=0.2", "#verdict"),
}


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
@pytest.mark.parametrize("view", VIEWS)
def test_no_violation(visit, view: str, size, scheme) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not installed")
    state, shown = VIEWS[view]
    page = visit(state, size=size, scheme=scheme)
    page.locator(shown).first.wait_for(timeout=60_000)
    if state:
        explained(page)
    check(page)
    if view == "look":
        page.get_by_role("button", name="Copy as code").click()
        check(page)
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= size[0], "nothing is cut off at the side"


def check(page) -> None:
    page.evaluate(AXE.read_text())
    found = page.evaluate("async () => (await axe.run()).violations")
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]][:4]) for v in found] == []
