"""The project's Markdown files, as their readers see them: headings, links, code, tables, and parts between marks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """All but the blocks of code."""
        return _FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        """Blocks of code in this language; those without one are ``""``."""
        return [code for given, code in _FENCE.findall(self.text) if given == language]

    @cached_property
    def spans(self) -> list[str]:
        """Code inside lines, without the backticks."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]

    @cached_property
    def anchors(self) -> set[str]:
        """What a link may name after ``#``: headings as GitHub makes anchors of them."""
        found: list[str] = []
        for heading in re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE):
            anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            n = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in found)
            found.append(f"{anchor}-{n}" if n else anchor)
        return set(found)

    @cached_property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", self.prose))

    def between(self, mark: str) -> str:
        """The text between two marks, ``<!-- mark: begin -->`` and ``<!-- mark: end -->``."""
        return re.search(rf"<!-- {mark}: begin -->\n(.*?)\n<!-- {mark}: end -->", self.text, re.DOTALL)[1]

    def code(self, mark: str) -> str:
        """The one block of code between two marks."""
        (found,) = _FENCE.findall(self.between(mark))
        return found[1]


def table(text: str) -> list[list[str]]:
    """Cells of a table's rows, its header first and without the line below it."""
    header, _, *body = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *body)]


def _files() -> Iterator[Path]:
    yield ROOT / "README.md"
    for folder in ("cache", "stages", "pipeline", "tests"):
        yield from sorted((ROOT / folder).rglob("*.md"))


PAGES = {page.name: page for page in map(Page, _files())}


def page_with(mark: str) -> Page:
    """The one page that has these marks."""
    (found,) = (page for page in PAGES.values() if f"<!-- {mark}: begin -->" in page.text)
    return found
