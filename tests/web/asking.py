"""What several tests of the page do and see."""

from __future__ import annotations

import re
from collections.abc import Callable

CAT = "sample=cat"


def explained(page, label: str = "") -> None:
    """Wait until the page answers why, and shows a map."""
    page.wait_for_function(
        "label => document.querySelector('#question em')?.textContent.includes(label)", arg=label
    )
    page.wait_for_function("() => document.querySelector('#work').ariaBusy === 'false'")


def labels(page) -> list[str]:
    return page.locator("#predictions .label").all_inner_texts()


def probabilities(page) -> list[float]:
    texts = page.locator("#predictions .percent").all_inner_texts()
    return [float(re.search(r"[\d.]+", text)[0]) for text in texts]


def pixels(page, selector: str = "#view-look .heat") -> list[int]:
    """The bytes of every 13th pixel of a canvas."""
    return page.evaluate(
        """selector => {
          const canvas = document.querySelector(selector);
          const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          return Array.from(all.filter((_, i) => i % 52 < 4));
        }""",
        selector,
    )


def links_to(page, **state: str) -> None:
    """Wait until the address holds this state, and nothing else."""
    until(
        page,
        lambda: (
            set(page.url.partition("#")[2].split("&")) == {f"{k}={v}" for k, v in state.items()}
        ),
    )


def until(page, condition: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Let the page work until a condition of the test holds."""
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not happen in time")
