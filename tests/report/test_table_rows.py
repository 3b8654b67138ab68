"""Tables of mixtures stay readable: layers that do the same in many experts of a block are one row."""

from __future__ import annotations

from compressor.report.blocks import LayerTable
from compressor.report.table_rows import rows_of_experts_together


def rows(experts: int) -> list[tuple[str, ...]]:
    return [
        ("attention", "8 x 8", "3", "plain", "52.1 %"),
        *(
            (f"blocks.{block}.experts.{number}.{role}", "8 x 4", str(2 + number), "plain", f"{50 + number / 2:.1f} %")
            for block in range(2)
            for number in range(experts)
            for role in ("up", "down")
        ),
    ]


def test_many_experts_are_one_row_a_block_and_kind() -> None:
    shown = rows_of_experts_together(rows(100))
    assert shown == (
        ("attention", "8 x 8", "3", "plain", "52.1 %"),
        *(
            (f"blocks.{block}.experts.0-99.{role}", "8 x 4", "2-101", "plain", "50.0-99.5 %")
            for block in range(2)
            for role in ("up", "down")
        ),
    )


def test_few_experts_have_a_row_each() -> None:
    assert set(rows_of_experts_together(rows(8))) == set(rows(8))
    assert len(rows_of_experts_together(rows(9))) == 5


def test_words_and_numbers_that_differ_are_both_there() -> None:
    names = [f"experts.{number}.up" for number in range(10)]
    cells = ["dense", *(str(number) for number in (12, 5, 5, 5, 5, 5, 5, 5, 5))]
    [(name, found)] = rows_of_experts_together([(name, cell) for name, cell in zip(names, cells, strict=True)])
    assert (name, found) == ("experts.0-9.up", "dense, 12, 5")


def test_the_page_has_them_together_too() -> None:
    table = LayerTable(("layer", "shape", "rank", "form", "kept"), tuple(rows(64)))
    assert table.html().count("<tr") == 6
