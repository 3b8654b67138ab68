"""The blocks of a page: what got worse is red where there are colors, and nothing else is."""

from __future__ import annotations

import io
import re
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from compressor.evaluation import Change, Remark
from compressor.report.blocks import Page, SideBySide, VerdictLine

RED = re.compile(r"\x1b\[(?:1;)?31m(.*?)\x1b\[0m")

remarks = st.lists(
    st.builds(Remark, st.text("abcdef", min_size=3, max_size=8), st.sampled_from([*get_args(Change), None])),
    min_size=1,
    max_size=4,
).map(tuple)


def on_terminal(block: RenderableType, *, no_color: bool = False) -> str:
    buffer = io.StringIO()
    console = Console(
        file=buffer, force_terminal=True, color_system="standard", width=80, highlight=False, no_color=no_color
    )
    console.print(block)
    return buffer.getvalue()


@given(remarks)
def test_the_parts_of_a_verdict_that_got_worse_are_red_and_no_others(found: tuple[Remark, ...]) -> None:
    line, worse = VerdictLine(found), [each.words for each in found if each.change == "worse"]
    assert RED.findall(on_terminal(line)) == worse
    assert re.findall(r'<span class="worse">(\w+)</span>', line.html()) == worse
    assert "31m" not in on_terminal(line, no_color=True)
    assert Page((line,)).text() == ", ".join(each.words for each in found)


@given(st.sets(st.integers(0, 3)))
def test_the_cells_of_a_comparison_that_got_worse_are_red_and_no_others(worse: set[int]) -> None:
    rows = tuple((f"row {number}", "10", "12", f"{number}.0 %") for number in range(4))
    table = SideBySide(("", "before", "after", "compared"), rows, frozenset(worse))
    cells = [f"{number}.0 %" for number in sorted(worse)]
    assert [cell.strip() for cell in RED.findall(on_terminal(table))] == cells
    assert re.findall(r'<td class="worse">([^<]*)</td>', table.html()) == cells


def test_names_of_metrics_steer_no_terminal() -> None:
    line = VerdictLine((Remark("f1\x1b[2J\n <b>", "worse"),))
    assert "\x1b" not in Page((line,)).text()
    assert "<b>" not in line.html()
