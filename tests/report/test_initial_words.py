"""What pages, cards, and reports say of the initialization that was looked for."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from compressor.initial import InitialFound, SeedSearch, Start, StartedLayer
from compressor.measure import EffectiveRanks
from compressor.planning import LayerPlan
from compressor.recipe import TrainingRecipe
from compressor.report.blocks import LayerTable
from compressor.report.html import report_page
from compressor.report.initial_words import gaining_layers, initial_table, initial_use, initial_verdict
from compressor.report.model_card import model_card
from compressor.report.pages import compression_page, inspection_page, plan_page
from compressor.results import Compression, Inspection
from tests.report.results import compression_of, plan_of


def ranks(energy: int) -> EffectiveRanks:
    return EffectiveRanks(96, 96, energy, energy, float(energy), float(energy), 3.0)


def started(name: str, *, written: float = 0.22, rank: int = 52, bound: int | None = None) -> StartedLayer:
    start = Start(0.98, 93.8, 0.9502, 0.9541, 0.9502, written=written, rank_bound=bound)
    return StartedLayer(name, start, ranks(74), ranks(rank))


SEARCH = SeedSearch("what the recipe states, 0 to 9,999", 10_040, 21.5, 132.4, 4.1, False, 2e-8)
GAINS = InitialFound("seed 0", 0, "searched", 26, (started("first"), started("second", bound=64)), SEARCH)


def planned(found: InitialFound | None, *layers: LayerPlan) -> Compression:
    return compression_of(plan_of(*layers, initial=found))


def layer(name: str, rank: int | None, share: float | None) -> LayerPlan:
    form = "dense" if rank is None else "plain" if share is None else "initial+plain"
    parameters = 96 * 96 if rank is None else 192 * rank
    return LayerPlan(name, (96, 96), "linear", rank, form, parameters, 0.05, "its share", share=share)


def test_what_is_found_is_the_first_line_of_an_inspection() -> None:
    inspection = Inspection("model", TrainingRecipe(), (), 9216, 36_864, None, initial=GAINS)
    first = " ".join(inspection_page(inspection).text().partition("\n\n")[0].split())
    assert first == (
        "the initialization is seed 0: 2 of 26 layers correlate with it (z 94 to 94); training wrote 22 % of the norm"
    )


def test_that_it_gains_nothing_is_said() -> None:
    found = replace(GAINS, layers=(started("first", written=0.98, rank=73),))
    assert gaining_layers(found) == []
    assert initial_verdict(found).endswith("; training wrote almost all there is, 98 % of the norm")
    some = replace(found, layers=(*found.layers, started("second")))
    assert "1 of them gain by it" in initial_verdict(some)


@pytest.mark.parametrize(("written", "rank"), [(0.98, 60), (0.8, 74)])
def test_a_layer_gains_by_a_lower_rank_or_a_smaller_norm(written: float, rank: int) -> None:
    assert gaining_layers(replace(GAINS, layers=(started("first", written=written, rank=rank),)))


def test_a_seed_that_is_another_and_a_search_that_found_none_are_told_apart() -> None:
    wrong = InitialFound("seed 7", 7, "stated", 26)
    assert initial_verdict(wrong) == (
        "seed 7, which its recipe states, is not what it started from: no layer correlates with it (z below 8);"
        " an accelerator draws other numbers from the same seed"
    )
    none = InitialFound("", None, "searched", 26, search=replace(SEARCH, z=None))
    assert initial_verdict(none).startswith("no seed was found: 10,040 candidates in 21.5 s, of which the best")
    assert "z 4.1" in initial_verdict(none)


def test_a_plan_says_what_is_stored_of_such_layers() -> None:
    layers = (layer("first", 10, 0.95), layer("second", 0, 0.95), layer("third", None, None))
    plan = planned(GAINS, *layers).plan
    assert initial_use(plan) == (
        "2 of 3 layers store only what training wrote, 1 of them nothing but the seed: 1,920 of 18,432 numbers; loaded,"
        " they are dense"
    )
    assert initial_use(replace(plan, initial=None)) is None


@pytest.mark.parametrize("found", [None, GAINS])
def test_pages_cards_and_reports_tell_it_where_it_was_looked_for_and_say_nothing_otherwise(
    found: InitialFound | None,
) -> None:
    share = None if found is None else 0.95
    result = planned(found, layer("first", 10, share), layer("second", None, None))
    pages = (
        compression_page(result).text(),
        plan_page(result.plan).text(),
        report_page(result),
        model_card(result, name="small", base_model="dense", config=None, original=""),
    )
    for page in pages:
        assert ("the initialization is seed 0" in " ".join(page.split())) == (found is not None)
        assert ("what training wrote" in " ".join(page.split())) == (found is not None)


def test_that_no_layer_takes_it_is_said() -> None:
    result = planned(GAINS, layer("first", 10, None))
    assert "no layer loses less with it at this size" in " ".join(compression_page(result).text().split())
    fast = replace(result, plan=replace(result.plan, device="h100"))
    assert "it would be dense, and no faster" in " ".join(compression_page(fast).text().split())
    nothing = replace(GAINS, layers=(started("first", written=0.98, rank=73),))
    assert "no layer" not in compression_page(planned(nothing, layer("first", 10, None))).text()


def test_the_table_of_layers_fits_80_columns_with_all_its_numbers() -> None:
    found = replace(GAINS, layers=tuple(started(f"vit.encoder.layer.{i}.attention.key", bound=64) for i in range(3)))
    stream = io.StringIO()
    Console(file=stream, width=80, force_terminal=True, color_system=None).print(LayerTable(*initial_table(found)))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    for line in lines[-3:]:
        assert line.split()[1:] == ["94", "0.950", "0.954", "0.950", "22", "%", "74", "52", "64"]


def test_there_is_no_column_of_bounds_where_none_binds() -> None:
    headers, rows = initial_table(replace(GAINS, layers=(started("first"),)))
    assert "bound" not in headers
    assert len(headers) == len(rows[0])


def test_what_no_seed_draws_is_needed_to_load_a_model_and_said_to_be() -> None:
    layers = (layer("first", 10, 0.95),)
    read = replace(GAINS, source="org/initial", seed=None, origin="given", search=None)
    for config, call in ((None, '"small", build_model, initial="org/initial"'), ({}, '"small", initial="org/initial"')):
        card = model_card(planned(read, *layers), name="small", base_model="dense", config=config, original="")
        assert f"model = compressor.load_model({call})" in card
        assert "initial=" not in model_card(
            planned(GAINS, *layers), name="small", base_model="dense", config=config, original=""
        )
    assert "loaded with org/initial, they are dense" in (initial_use(planned(read, *layers).plan) or "")
