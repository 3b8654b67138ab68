"""The flags of the commands are generated from the options, and lead back to the same options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from compressor.api.kinds import TRAINING_FLAGS
from compressor.api.option import Options
from compressor.api.options import VERBS, CompressOptions, DiagnoseOptions, MergeOptions, PlanOptions
from compressor.cli.parameters import typer_command
from compressor.cli.run import run
from compressor.errors import BadInput
from compressor.recipe import TrainingRecipe


def parsed(of: type[Options], words: list[str]) -> Any:
    """The options that a command line leads to."""
    found = []

    def note(model: str, options: Options, shown: Options) -> None:
        found.append(options)

    # What typer is to evaluate is given as types, not as text.
    note.__annotations__ = {"model": str, "options": of, "shown": Options, "return": None}
    app = typer.Typer(add_completion=False)
    app.command()(typer_command(note, of))
    typer.main.get_command(app).main(words, standalone_mode=False)
    return found[0]


NAMES = st.text("abcxyz01._-", min_size=1, max_size=6).filter(lambda text: text.strip(".-") == text)
SHARES = st.floats(0.01, 1).map(lambda share: float(f"{share:.10g}"))
OF_COMPRESS = st.fixed_dictionaries(
    {"keep": SHARES},
    optional={
        "include": st.lists(NAMES, min_size=1, max_size=3),
        "exclude": st.lists(NAMES, min_size=1, max_size=2),
        "embeddings": st.booleans(),
        "form": st.sampled_from(["auto", "plain", "pivoted"]),
        "data": NAMES,
        "calibration": NAMES,
        "factory": NAMES.map(lambda name: f"{name}.py:build"),
        "max_shard_size": st.integers(1, 10**12),
        "recipe": st.lists(
            st.one_of(NAMES.map(Path), SHARES.map(lambda rate: TrainingRecipe(learning_rate=rate, nesterov=True))),
            min_size=1,
            max_size=1,
        ),
    },
)


@pytest.mark.slow
@given(OF_COMPRESS)
def test_the_command_that_repeats_a_run_asks_for_the_same(keywords: dict[str, Any]) -> None:
    asked = CompressOptions(**keywords)
    again = parsed(CompressOptions, shlex.split(asked.command("m"))[1:])
    false_switches = {name for name in ("embeddings",) if keywords.get(name) is False}
    assert again == asked
    assert again.given == asked.given - false_switches


def test_what_was_not_said_was_not_given() -> None:
    assert parsed(CompressOptions, ["m"]).given == set()
    assert parsed(CompressOptions, ["m", "--keep", "0.5", "--calibration", "c", "--seed", "0"]).given == {
        *("keep", "calibration", "seed")
    }


@pytest.mark.parametrize("of", [of for of in VERBS if hasattr(of, "recipe") and of.verb != "explore"])
@pytest.mark.parametrize("field", TRAINING_FLAGS)
def test_a_training_flag_sets_its_field_and_is_named_as_its_source(of: type[Options], field: str) -> None:
    kind, flag, _ = TRAINING_FLAGS[field]
    text, value = {str: ("sgd", "sgd"), bool: ("", True), int: ("3", 3), float: ("0.25", 0.25)}[kind]
    required = ["--output", "out"] if of.missing({}) == "output" else []
    [recipe] = parsed(of, ["m", flag, *([text] if text else []), *required]).recipe
    assert getattr(recipe, field) == value
    assert recipe.sources[field] == f"flag {flag}"


def test_flags_on_the_training_go_before_a_file() -> None:
    said, file = parsed(DiagnoseOptions, ["m", "--recipe", "r.yaml", "--lr", "0.5"]).recipe
    assert said.learning_rate == 0.5
    assert file == Path("r.yaml")


def test_flags_go_before_a_file_of_options(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("keep: 50%\nembeddings: true\nrecipe: {optimizer: sgd}\n")
    asked = parsed(PlanOptions, ["m", "--config", str(config), "--keep", "0.7"])
    assert (asked.keep, asked.embeddings, asked.recipe[0].optimizer) == (0.7, True, "sgd")


def test_flags_may_add_what_a_file_lacks(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("calibration: c.txt\n")
    asked = parsed(PlanOptions, ["m", "--config", str(config), "--keep", "0.5"])
    assert (asked.calibration, asked.keep) == (Path("c.txt"), 0.5)
    with pytest.raises(BadInput, match="calibration shares a size"):
        parsed(PlanOptions, ["m", "--config", str(config)])
    config.write_text("mode: concat\n")
    assert parsed(MergeOptions, ["m", "--config", str(config), "--output", "out"]).mode == "concat"
    with pytest.raises(BadInput, match="`output` is missing"):
        parsed(MergeOptions, ["m", "--config", str(config)])


def test_a_flag_replaces_the_other_budget_of_a_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("keep: 50%\nembeddings: true\n")
    asked = parsed(PlanOptions, ["m", "--config", str(config), "--max-size", "1MB"])
    assert (asked.keep, asked.max_size, asked.given) == (None, 10**6, {"embeddings", "max_size"})


def test_training_flags_go_before_the_recipe_of_a_file_and_leave_the_rest(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("recipe: {optimizer: sgd, learning_rate: 0.1}\n")
    flags, file = parsed(PlanOptions, ["m", "--config", str(config), "--lr", "0.5"]).recipe
    assert (flags.learning_rate, flags.optimizer, file.optimizer) == (0.5, None, "sgd")


def test_the_help_begins_with_what_is_required_and_gives_switches_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    run(["merge", "--help"])
    shown = capsys.readouterr().out
    flags = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", shown, re.MULTILINE)
    assert flags[0] == "--output"
    assert shown.count("Required.") == 1
    assert "<bool>" not in shown


def test_an_empty_name_of_a_file_of_options_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["m", "--config", ""]) == 2
    assert "--config is empty; name a file" in capsys.readouterr().err


def test_a_required_option_may_stand_in_a_file(tmp_path: Path) -> None:
    config = tmp_path / "merge.yaml"
    config.write_text("mode: concat\noutput: out.safetensors\n")
    assert parsed(MergeOptions, ["m", "--config", str(config)]).mode == "concat"
    with pytest.raises(BadInput, match="`output` is missing") as refused:
        parsed(MergeOptions, ["m", "--mode", "sum"])
    assert refused.value.option == "output"
