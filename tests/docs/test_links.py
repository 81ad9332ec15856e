"""Links between pages lead somewhere, to their anchors too; those to other sites are well formed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
OWN = "https://github.com/heatlens/heatlens/tree/main/"
LINK = re.compile(
    r"\]\(([^()\s]+)(?: \"[^\"]*\")?\)|(?:href|src)=\"([^\"]+)\"|<(https?://[^>\s]+)>"
)


def pages() -> list[str]:
    if not (ROOT / ".git").exists():
        return [str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")]
    listed = ["git", "ls-files", "*.md"]
    return subprocess.run(
        listed, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return re.sub(r"`[^`\n]+`", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in (first or second or third for first, second, third in LINK.findall(prose(page))):
        url = urlsplit(link)
        if link.startswith(OWN):
            target = ROOT / unquote(url.path.split("/tree/main/")[1])
        elif url.scheme in {"http", "https"}:
            if not re.fullmatch(r"[\w.-]+(:\d+)?", url.netloc):
                found.append(link)
            continue
        elif url.scheme:
            found.append(link)
            continue
        else:
            target = page.parent / unquote(url.path) if url.path else page
        is_page = target.suffix == ".md" and target.is_file()
        if not target.exists() or (
            url.fragment and is_page and url.fragment not in anchors(target)
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    assert broken(ROOT / page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Some `code`, and more\n[a](page.md#some-code-and-more) [b](page.md#nowhere) [c](absent.md) "
        f"[d](https://) [e]({OWN}absent) [f]({OWN}README.md) <https://example.org/a> `[g](absent)`\n"
    )
    assert broken(page) == ["page.md#nowhere", "absent.md", "https://", f"{OWN}absent"]
