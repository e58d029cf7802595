"""The pages that people read: their numbers are those of bench/results/, and the files they point to are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.readme import PAGES, REPEATED, ROOT, SECTIONS, render


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert render(text) == text, "run `python -m bench.readme`"


def test_every_table_is_marked_and_filled() -> None:
    sections = re.compile(r"<!-- results: ([\w ]+) -->\n(.*?)<!-- end -->", re.DOTALL)
    bodies = {match[1]: match[2] for page in PAGES for match in sections.finditer(page.read_text())}
    assert set(bodies) == set(SECTIONS)
    assert all("|---" in body for body in bodies.values())


def test_a_table_stands_on_one_page() -> None:
    standing = [name for page in PAGES for name in re.findall(r"<!-- results: ([\w ]+) -->", page.read_text())]
    assert {name for name in standing if standing.count(name) > 1} <= set(REPEATED)


def test_a_typed_number_is_noticed() -> None:
    text = PAGES[0].read_text()
    forged = re.sub(r"(<!-- results: accuracy -->\n(?:.*\n){2}.*?)0\.\d", r"\g<1>9.9", text)
    assert forged != text
    assert render(forged) == text


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
