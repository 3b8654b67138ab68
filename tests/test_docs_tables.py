"""The tables of the pages are what the benchmarks' results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.tables import PAGES, ROOT, filled


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_of_a_page_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, "run `python -m docs.tables`"


def test_a_figure_that_was_typed_is_replaced() -> None:
    head, tail = "before\n\n<!-- table: reference_models.table of reference_models.json -->", "<!-- end -->\n\nafter"
    page = filled(f"{head}\n\n| 100% |\n\n{tail}")
    assert "| digits-mlp | `--keep 0.8" in page
    assert "| 100% |" not in page
    assert page.startswith(head)
    assert page.endswith(tail)
