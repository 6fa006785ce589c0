"""Documents as a whole: README is a page, lines can be read, links lead somewhere, paths and names exist."""

import importlib
import re

import pytest

from tests.test_docs.pages import PAGES, ROOT
from tests.test_docs.settings import SETTINGS, key_of

README = PAGES["README.md"]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def test_readme_is_a_page():
    assert len(README.text.splitlines()) <= 240
    assert len(README.text.encode()) <= 18_000


def test_ones_own_images_begin_within_forty_lines():
    assert README.text.splitlines().index("## Your own images") < 40


@EVERY_PAGE
def test_lines_can_be_read(page):
    """Rows of tables may be as long as they are."""
    assert [line for line in page.text.splitlines() if len(line) > 160 and not line.startswith("|")] == []


@EVERY_PAGE
def test_every_link_leads_somewhere(page):
    for target in page.links:
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        found = (page.path.parent / path).resolve() if path else page.path
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        if anchor:
            assert anchor in PAGES[found.relative_to(ROOT).as_posix()].anchors, target


def test_every_page_is_linked():
    """From README, in some steps."""
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = PAGES[waiting.pop()]
        reached.add(page.name)
        for target in page.links:
            found = (page.path.parent / target.partition("#")[0]).resolve()
            name = found.relative_to(ROOT).as_posix() if found.is_relative_to(ROOT) else ""
            if name in PAGES and name not in reached:
                waiting.append(name)
    assert reached == set(PAGES)


@EVERY_PAGE
def test_every_path_that_is_named_exists(page):
    for span in page.spans:
        if re.fullmatch(r"(cache|stages|pipeline|tests|\.ci)/[\w./-]*", span) and "mine" not in span:
            assert (ROOT / span).exists(), span


@EVERY_PAGE
def test_every_name_of_the_code_exists(page):
    for span in page.spans:
        if re.fullmatch(r"(cache|stages|pipeline|tests)(\.\w+)+", span) and key_of(span) not in SETTINGS:
            module, _, name = span.rpartition(".")
            try:
                importlib.import_module(span)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), name), span


def test_anchors_are_those_of_github(tmp_path):
    page = PAGES["README.md"].__class__(tmp_path / "a.md")
    page.path.write_text("# `[train]`: a b\n\n## --dry-run\n\n```\n# none\n```\n\n## K, and k\n\n## K and k\n", "utf-8")
    assert page.anchors == {"train-a-b", "--dry-run", "k-and-k", "k-and-k-1"}
