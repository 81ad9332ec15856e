"""What the web page adds to a request: from a picture dropped to its heatmap seen, beside the bare request.

    python -m benchmarks.page                        # starts the service itself
    python -m benchmarks.page --url http://127.0.0.1:8000

Each round drops a picture on the page in Chromium, and sends the same request with `fetch` from the
same page, in turns. Both times are taken by the browser's clock: from the drop until the frame with
the heatmap was drawn, and from the call until its JSON was parsed. Needs the extra `test` and
Chromium.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table

import service
from benchmarks.servers import heatlens
from benchmarks.timing import machine_line
from service.cli.bench.client import parse_url

_SAMPLES = Path(service.__file__).parent / "web" / "samples"
_BARE = """async bytes => {
  const {explainOptions} = await import(new URL('page/js/request.js', document.baseURI));
  const body = new FormData();
  body.append('image', new File([new Uint8Array(bytes)], 'cat.jpg', {type: 'image/jpeg'}));
  body.append('options', JSON.stringify(explainOptions()));
  const begun = performance.now();
  await (await fetch('v1/explain', {method: 'POST', body})).json();
  return performance.now() - begun;
}"""
_DROP = """async bytes => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], 'cat.jpg', {type: 'image/jpeg'}));
  performance.clearMarks();
  const begun = performance.now();
  document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true}));
  while (!performance.getEntriesByName('heatlens:shown').length)
    await new Promise(requestAnimationFrame);
  return performance.getEntriesByName('heatlens:shown')[0].startTime - begun;
}"""


def main(
    *,
    url: Annotated[str, typer.Option(help="A running service; started here without.")] = "",
    picture: Annotated[Path, typer.Option(help="What is dropped.")] = _SAMPLES / "cat.jpg",
    rounds: Annotated[int, typer.Option(help="Pairs of a drop and a bare request.")] = 40,
) -> None:
    """Measure and print a small table."""
    if url:
        _measure(f"{parse_url(url)}/", picture, rounds)
        return
    with heatlens() as server:
        server.wait_ready()
        _measure(server.url(), picture, rounds)


def _measure(url: str, picture: Path, rounds: int) -> None:
    content = list(picture.read_bytes())
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.locator("#samples-list img").first.wait_for()
        # The first one warms everything up.
        page.evaluate(_DROP, content)
        pairs = [
            (page.evaluate(_BARE, content), page.evaluate(_DROP, content)) for _ in range(rounds)
        ]
        browser.close()
    _print(pairs)


def _print(pairs: list[tuple[float, float]]) -> None:
    bare, seen = zip(*pairs, strict=True)
    added = sorted(after - before for before, after in pairs)
    rows: dict[str, Any] = {
        "bare request": statistics.median(bare),
        "dropped to seen": statistics.median(seen),
        "added, median of pairs": statistics.median(added),
        "added, quartiles": f"{added[len(added) // 4]:.0f} to {added[3 * len(added) // 4]:.0f}",
    }
    console = Console(width=100)
    table = Table("", "ms")
    for name, value in rows.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:.1f}")
    console.print(machine_line())
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
