"""Tables of mixtures stay readable: layers that do the same in many experts of a block are one row."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from compressor.api.flags import with_flags
from compressor.report.blocks import LayerTable, Page
from compressor.report.layer_groups import kinds_by_name
from compressor.report.table_rows import rows_by_kind, rows_of_experts_together


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


def blocks(count: int) -> tuple[tuple[str, ...], ...]:
    return (
        ("head", "9 x 8", "3"),
        *((f"layers.{block}.{role}", "8 x 4", str(2 + block)) for block in range(count) for role in ("up", "down")),
    )


def shown(table: LayerTable, width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_a_table_of_many_layers_has_a_row_for_each_kind_with_how_many_and_the_ranges() -> None:
    page = Page((LayerTable(("layer", "shape", "rank"), blocks(24)),)).listing((), "`layers=all` lists each")
    lines = shown(page.reworded(with_flags).blocks[0])  # type: ignore[arg-type]
    assert [line.split() for line in lines] == [
        ["layer", "layers", "shape", "rank"],
        lines[1].split(),
        ["head", "1", "9", "x", "8", "3"],
        ["layers.*.up", "24", "8", "x", "4", "2-25"],
        ["layers.*.down", "24", "8", "x", "4", "2-25"],
        ["49", "layers,", "a", "row", "for", "each", "kind;", "--layers", "all", "lists", "each"],
    ]


@pytest.mark.parametrize("listed", [("all",), ("*",), ("re:^", "no such")])
def test_all_layers_are_listed_on_request(listed: tuple[str, ...]) -> None:
    table = LayerTable(("layer", "shape", "rank"), blocks(24), listed=listed)
    assert [line.split()[0] for line in shown(table)[2:]] == [name for name, *_ in blocks(24)]


def test_those_that_match_are_listed_and_none_is_said() -> None:
    table = LayerTable(("layer", "shape", "rank"), blocks(24))
    assert [line.split()[0] for line in shown(replace(table, listed=("*.3.*",)))[2:]] == [
        "layers.3.up",
        "layers.3.down",
    ]
    assert shown(replace(table, listed=("none",)))[-1] == "no layer here is called none"


def test_few_layers_and_rows_of_something_else_are_as_they_are() -> None:
    assert len(shown(LayerTable(("layer", "shape", "rank"), blocks(19)))) == 39 + 2
    trials = LayerTable(("kept", "drop", "verdict"), tuple((f"0.{at}.1", "0", "-") for at in range(60)), listed=("x",))
    assert len(shown(replace(Page((trials,)).listing(("x",), "").blocks[0], listed=()))) == 60 + 2  # type: ignore[type-var]


def test_further_numbers_of_names_do_not_count_where_there_are_too_many_kinds() -> None:
    rows = [(f"stages.{stage}.blocks.{block}.mlp", "8 x 4") for stage in range(4) for block in range(30)]
    assert rows_by_kind(rows, most=40) == tuple((f"stages.*.blocks.{block}.mlp", "4", "8 x 4") for block in range(30))
    assert list(dict.fromkeys(kinds_by_name([name for name, _ in rows], most=40))) == [
        name for name, *_ in rows_by_kind(rows, most=40)
    ]
    assert rows_by_kind(rows, most=20) == (("stages.*.blocks.*.mlp", "120", "8 x 4"),)
