"""Tables, cards, and reports say of each layer in how many bits it is, and nothing of bits where none are."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from compressor.planning import Budget, LayerPlan, Plan
from compressor.report.html import report_page
from compressor.report.model_card import model_card
from compressor.report.pages import compression_page, plan_page
from compressor.report.wording import budget_words, missed_share_words
from compressor.results import BeforeAfter
from tests.report.results import compression_of, plan_of

FORMS = {"dense@4g128": 0, "plain@8": 12, "dense@2g64z": 3, "initial+pivoted@5g128": 9, "pivoted": 7, "dense": None}
SHOWN = [("-", "dense", "4g128"), ("12", "plain", "8"), ("3", "dense", "2g64z")]
SHOWN += [("9", "initial+pivoted", "5g128"), ("7", "pivoted", "-"), ("-", "dense", "-")]


def layers() -> list[LayerPlan]:
    return [
        LayerPlan(f"model.layers.{i}.mlp.down_proj", (4096, 11008), "linear", rank, form, 10**6, 0.0625, f"reason {i}")
        for i, (form, rank) in enumerate(FORMS.items())
    ]


def test_a_table_has_rank_form_and_bits_in_80_columns() -> None:
    buffer = io.StringIO()
    page = plan_page(plan_of(*layers()))
    Console(file=buffer, force_terminal=True, color_system=None, width=80).print(page)
    assert max(map(len, buffer.getvalue().splitlines())) <= 80
    rows = [line.split() for line in page.text().splitlines() if "4096 x 11008" in line]
    assert [tuple(row[4:7]) for row in rows] == SHOWN
    assert re.search("^bits  +4g32 is 4 bits with a scale for every 32 inputs", page.text(), re.MULTILINE)
    assert "eligible parameters, in 16 bits" in page.text()


def test_a_card_and_a_report_have_them_too() -> None:
    result = compression_of(plan_of(*layers()))
    card = model_card(result, name="small", base_model="dense", config=None, original="")
    for rank, form, bits in SHOWN:
        assert f"| {rank} | {form} | {bits} |" in card
    assert "with 3 of its 6 eligible matrices as products of low-rank factors and 4 in 2 to 8 bits: " in card
    assert "of the bytes that their parameters take in 16 bits are kept" in card
    page = report_page(result)
    assert "<th>bits</th>" in page
    assert len(re.findall("<td[^>]*>4g128</td>", page)) == 1


def test_of_bits_nothing_is_said_where_none_are() -> None:
    result = compression_of(plan_of(layers()[4]))
    card = model_card(result, name="small", base_model="dense", config=None, original="")
    for text in (compression_page(result).text(), card, report_page(result).partition("</style>")[2]):
        assert re.search(r"\bbits\b", text) is None


def test_all_of_one_width_is_a_budget_in_words() -> None:
    assert budget_words(Budget("bits", 4)) == "every layer in 4 bits"


@pytest.mark.parametrize(("form", "missed"), [("dense@8", False), ("plain", True)])
def test_a_share_of_bytes_is_not_missed_because_all_numbers_are_kept(form: str, missed: bool) -> None:
    from compressor.network import Layer

    other = Layer("other", "other", "other.weight", None, "linear", (5, 4), (5, 4), skip="a vector")
    layer = LayerPlan("layer", (10, 8), "linear", 0 if "@" in form else 1, form, 40, 0.1, "its share")
    plan = Plan("model", None, Budget("keep", 0.5), (layer,))
    result = compression_of(plan, parameters=BeforeAfter(100, 100), skipped=(other,))
    assert (missed_share_words(result) is not None) == missed
