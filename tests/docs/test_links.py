"""Every link in the documentation leads somewhere, and every command and make target that it shows exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from automode.cli.main import COMMANDS

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md"])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that a Markdown page's headings get."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else (page.parent / name).resolve()
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title, of two\n[a](#a-title-of-two) [b](#b) [c](c.md) [d](https://example.org)\n")
    assert broken(page) == ["#b", "c.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_every_command_and_target_that_is_shown_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = "\n".join(
        [
            *re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE),
            *re.findall(r"`([^`\n]+)`", text),
        ]
    )
    commands = set(re.findall(r"^(?:\$ )?automode ([a-z]+)", shown, re.MULTILINE))
    assert commands <= set(COMMANDS)
    targets = set(
        re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert set(re.findall(r"^(?:\$ )?make ([a-z-]+)", shown, re.MULTILINE)) <= targets


def test_every_decision_has_its_three_parts_and_its_number() -> None:
    files = sorted((REPOSITORY / "docs" / "decisions").glob("*.md"))
    numbers = [int(file.name[:4]) for file in files]
    assert numbers[0] == 1
    assert len(set(numbers)) == len(numbers)  # records that are written side by side may land in any order
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.startswith(f"# {int(file.name[:4])}. "), file.name
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Problem", "Choice", "Consequences"], (
            file.name
        )
