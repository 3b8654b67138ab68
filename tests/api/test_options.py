"""Options are stated once, and read alike from Python, a file and a shell."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compressor import CalibrationSettings
from compressor.api.flags import with_flags
from compressor.api.keywords import CompressKeywords
from compressor.api.kinds import TRAINING_FLAGS
from compressor.api.option import Options, described, verb
from compressor.api.options import VERBS, CompressOptions, EvaluateOptions, InspectOptions, MergeOptions, PlanOptions
from compressor.api.reference import keywords_source, reference_page
from compressor.arguments import Percent
from compressor.cli.commands import app
from compressor.errors import BadInput
from compressor.recipe import TrainingRecipe

ROOT = Path(__file__).parents[2]


def test_what_was_given_is_known_and_not_guessed_from_a_default() -> None:
    assert CompressOptions(calibration="c.txt", keep=0.5, seed=0).given == {"calibration", "keep", "seed"}
    assert CompressOptions(keep=0.5, data=None).given == {"keep"}


def test_a_replaced_option_is_given_and_no_default_is() -> None:
    asked = CompressOptions(keep=0.5, seed=0, calibration="c.txt")
    assert replace(asked, keep=0.4).given == {"keep", "seed", "calibration"}
    smaller = replace(CompressOptions(keep=0.5), keep=None, max_size="1MB", embeddings=True)
    assert (smaller.max_size, smaller.given) == (10**6, {"max_size", "embeddings"})
    merged = replace(MergeOptions(output="ab", mode="sum"), data=[[1.0], [2.0]])
    assert merged.given == {"output", "mode", "data"}


@given(st.floats(0.001, 1.0))
def test_a_share_is_read_alike_as_a_number_as_text_and_as_percent(share: float) -> None:
    assert CompressOptions(keep=share) == CompressOptions(keep=f"{share!r}")
    assert CompressOptions(keep=f"{100 * share!r}%").keep == pytest.approx(share)


@pytest.mark.parametrize("written", [0.7, "0.7", "0.7x", " 0.7X ", "70%"])
def test_a_latency_is_read_alike_as_a_ratio_and_as_percent(written: object) -> None:
    asked = CompressOptions(max_latency=written)
    assert asked.max_latency == pytest.approx(0.7)
    assert asked.command("m") == "compress m --max-latency 0.7"


@pytest.mark.parametrize("written", [(1, 32), [1, 32], "1,32", "1, 32,1"])
def test_batch_sizes_are_read_alike_as_numbers_and_as_text(written: object) -> None:
    asked = CompressOptions(batch=written)
    assert asked.batch == CompressOptions().batch == (1, 32)
    assert asked.command("m") == "compress m --batch 1,32"
    assert CompressOptions(batch=8).batch == (8,)


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ({"keep": 0.5, "max_size": "1MB"}, "keep"),
        ({"keep": "half"}, "keep"),
        ({"max_size": "big"}, "max_size"),
        ({"form": "square"}, "form"),
        ({"include": ""}, "include"),
        ({"exclude": ["*", "re:("]}, "exclude"),
        ({"recipe": {"lr": 0.1}}, "recipe"),
        ({"output": ""}, "output"),
        ({"data_samples": 0, "data": "d.txt"}, "data_samples"),
        ({"seed": 3}, "seed"),
        ({"effort": "fast"}, "effort"),
        ({"effort": "most", "calibration": "c.txt", "keep": 0.5}, "effort"),
        (
            {"effort": "fast", "calibration_settings": CalibrationSettings(), "calibration": "c.txt", "keep": 0.5},
            "effort",
        ),
        ({"max_drop": 0.01}, "max_drop"),
        ({"allow_miss": True}, "allow_miss"),
        ({"calibration": "c.txt"}, "calibration"),
        ({"calibration": "c.txt", "tolerance": 0.1}, "calibration"),
        ({"base": "b", "form": "pivoted"}, "form"),
        ({"base": "b", "calibration": "c.txt"}, "calibration"),
        ({"base": "b", "seed": 0, "keep": 0.2}, "seed"),
        ({"push_to": "me/it", "dry_run": True}, "push_to"),
        ({"plan": "p.json", "form": "plain"}, "plan"),
        ({"plan": "p.json", "prefer": "speed"}, "plan"),
        ({"plan": "p.json", "max_latency": 0.7}, "max_latency"),
        ({"max_latency": 0.7, "tolerance": 0.1}, "max_latency"),
        ({"max_latency": 0.7, "prefer": "size"}, "max_latency"),
        ({"max_latency": "fast"}, "max_latency"),
        ({"target_device": "h100", "prefer": "size"}, "target_device"),
        ({"target_device": 3}, "target_device"),
        ({"batch": "1,big"}, "batch"),
        ({"batch": ()}, "batch"),
        ({"batch": 0}, "batch"),
        ({"rank_multiple": 0}, "rank_multiple"),
        ({"max_drop": 0.01, "keep": 0.5}, "max_drop"),
        ({"base": "b", "batch": 1}, "batch"),
        ({"base": "b", "max_latency": 0.7}, "max_latency"),
        ({"base": "b", "prefer": "size"}, "prefer"),
        ({"base": "b", "initial": 0}, "initial"),
    ],
)
def test_bad_options_are_refused_with_the_option_they_are_about(asked: dict[str, object], option: str) -> None:
    with pytest.raises(BadInput) as refused:
        CompressOptions(**asked)
    assert refused.value.option == option
    assert "--" not in str(refused.value)


def test_an_unknown_keyword_is_answered_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="'kepe'; did you mean 'keep'"):
        CompressOptions.of(None, {"kepe": 0.5})


def test_a_required_option_that_is_missing_is_named() -> None:
    with pytest.raises(TypeError, match=r"evaluate\(\) lacks the keyword argument 'data'"):
        EvaluateOptions.of(None, {})


def test_keywords_go_before_the_options_that_they_come_with() -> None:
    asked = CompressOptions.of(CompressOptions(keep=0.5, embeddings=True), {"keep": 0.7})
    assert (asked.keep, asked.embeddings, asked.given) == (0.7, True, {"keep", "embeddings"})


def test_a_budget_replaces_the_one_before_it() -> None:
    asked = CompressOptions.of(CompressOptions(keep=0.5, embeddings=True), {"max_size": "1MB"})
    assert (asked.keep, asked.max_size, asked.given) == (None, 10**6, {"embeddings", "max_size"})
    with pytest.raises(BadInput, match="two budgets"):
        CompressOptions.of(CompressOptions(keep=0.5), {"max_size": "1MB", "tolerance": 0.1})


def test_a_limit_that_may_stand_beside_a_size_leaves_it_and_replaces_what_it_contradicts() -> None:
    data = {"data": "test.csv"}
    beside = CompressOptions.of(CompressOptions(keep=0.5), {"max_latency": 0.7, "max_drop": 0.01, **data})
    assert (beside.keep, beside.max_latency, beside.max_drop) == (0.5, 0.7, 0.01)
    other = CompressOptions.of(CompressOptions(keep=0.5, max_latency=0.7), {"max_size": "1MB"})
    assert (other.keep, other.max_size, other.max_latency) == (None, 10**6, 0.7)
    assert CompressOptions.of(CompressOptions(tolerance=0.1), {"max_latency": 0.7}).tolerance is None
    alone = CompressOptions.of(CompressOptions(keep=0.5, max_latency=0.7), {"tolerance": 0.1})
    assert (alone.keep, alone.max_latency, alone.tolerance) == (None, None, 0.1)


def test_options_survive_a_file(tmp_path: Path) -> None:
    asked = CompressOptions(
        keep="60%", calibration="c.txt", seed=3, include=("*.mlp.*",), recipe=TrainingRecipe(optimizer="sgd")
    )
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump(asked.portable()))
    assert CompressOptions.from_file(path) == asked


def test_an_unknown_option_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("kepe: 0.5\n")
    with pytest.raises(
        BadInput, match=r"options\.yaml: holds the unknown option 'kepe'; leave it out; did you mean 'keep'"
    ):
        CompressOptions.from_file(path)


@pytest.mark.parametrize("text", ["embeddings: 'yes'\n", "keep: 0.5\nmax_size: 1MB\n", "keep: half\n"])
def test_a_bad_value_in_a_file_is_refused_with_the_name_of_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as refused:
        CompressOptions.from_file(path)
    assert (refused.value.where, refused.value.option in text) == (path, True)


def test_a_file_that_lacks_a_required_option_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("split: train\n")
    with pytest.raises(BadInput, match=r"options\.yaml: `data` is missing"):
        EvaluateOptions.from_file(path)


def test_an_object_is_in_no_file_and_stands_as_dots_in_the_command() -> None:
    asked = CompressOptions(keep=0.5, calibration=[object()])
    assert asked.portable() == {"keep": 0.5}
    assert asked.command("m") == "compress m --keep 0.5 --calibration ..."


def test_the_command_names_what_only_python_can_give() -> None:
    asked = CompressOptions(keep=0.5, data="d.csv", metric=lambda model, batches: 0.0, progress=print)
    assert asked.command("m") == "compress m --keep 0.5 --data d.csv # and in Python metric"


def test_the_command_holds_no_folder_of_this_machine() -> None:
    asked = CompressOptions(
        keep=0.5,
        factory="/home/me/train.py:build",
        data="/home/me/data.txt",
        recipe=[TrainingRecipe(learning_rate=0.1, nesterov=True), "/home/me/r.yaml"],
    )
    assert asked.command("a model") == (
        "compress 'a model' --keep 0.5 --lr 0.1 --nesterov --recipe r.yaml --data data.txt --model train.py:build"
    )


def test_a_base_is_named_without_its_folder_and_one_of_the_hub_in_full(tmp_path: Path) -> None:
    for base in ("/home/me/base", Path("/home/me/base"), "../me/base", "base"):
        asked = CompressOptions(base=base, keep=0.5)
        assert asked.portable() == {"base": "base", "keep": 0.5}
        assert asked.command("m") == "compress m --base base --keep 0.5"
    assert CompressOptions(base="org/base").portable() == {"base": "org/base"}


def test_each_option_of_each_verb_has_one_flag_and_help_at_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    commands = typer.main.get_group(app).commands
    for of in VERBS:
        shown = {parameter.name: parameter for parameter in commands[of.verb].params}
        for name, option, _ in described(of):
            if option.only_python:
                assert name not in shown
            else:
                assert shown[name].opts[0] == option.flag_of(name).partition("/")[0]
                assert shown[name].help.removesuffix(" Required.") == with_flags(option.help)


@pytest.mark.parametrize("of", VERBS, ids=lambda of: of.verb)
def test_an_option_is_stated_once(of: type[Options]) -> None:
    flags = [option.flag_of(name) for name, option, _ in described(of)]
    assert len(flags) == len(set(flags))
    assert all(option.help.endswith(".") for _, option, _ in described(of))


def test_the_signature_and_the_docstring_show_the_options() -> None:
    @verb(InspectOptions)
    def look(model: str, options: InspectOptions | None = None, **given: object) -> None:
        """Look at it.

        Args:
            model: The model.

        Returns:
            Nothing.
        """

    shown = inspect.signature(look)
    assert list(shown.parameters)[2:] == [name for name, _, _ in described(InspectOptions)]
    assert shown.parameters["epsilon"].default == 0.1
    assert look.__doc__ is not None
    arguments = look.__doc__.partition("Args:")[2].partition("Returns:")[0]
    assert all(f"    {name}: " in arguments for name, _, _ in described(InspectOptions))


def test_what_is_generated_from_the_options_is_up_to_date() -> None:
    remedy = "run `python -m compressor.api.reference`"
    assert (ROOT / "compressor" / "api" / "keywords.py").read_text() == keywords_source(), remedy
    assert (ROOT / "docs" / "reference" / "options.md").read_text() == reference_page(), remedy


def test_the_reference_page_has_the_flags_on_the_training() -> None:
    of_compress = reference_page().partition("## `inspect`")[0]
    for field, (_, flag, text) in TRAINING_FLAGS.items():
        assert f"| `recipe={{'{field}': ...}}` | `{flag}` |  | {text} |" in of_compress


def test_the_types_of_the_keywords_name_every_option() -> None:
    assert list(CompressKeywords.__annotations__) == [name for name, _, _ in described(CompressOptions)]


@pytest.mark.parametrize("of", VERBS)
def test_type_checkers_see_options_made_from_the_keywords_of_their_verb(of: type[Options]) -> None:
    [made] = [
        each
        for each in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(of))))
        if isinstance(each, ast.ClassDef) and each.name == of.__name__
    ]
    [initialize] = [each for each in ast.walk(made) if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    assert initialize.args.kwarg is not None
    assert initialize.args.kwarg.annotation is not None
    assert ast.unparse(initialize.args.kwarg.annotation) == f"Unpack[{of.verb.capitalize()}Keywords]"


def test_plan_takes_what_compress_takes_but_for_what_is_written() -> None:
    names = {name for name, _, _ in described(PlanOptions)}
    more = {name for name, _, _ in described(CompressOptions)} - names
    assert more == {"output", "overwrite", "max_shard_size", "allow_miss", "push_to", "dry_run", "work_dir"}


@pytest.mark.parametrize("output", ["kept", "kept/small", "."])
@pytest.mark.parametrize("name", ["work_dir", "calibration_cache"])
def test_what_a_run_keeps_lies_apart_from_its_output(name: str, output: str) -> None:
    with pytest.raises(BadInput, match=f"`{name}` and `output` are one folder, or one is in the other"):
        CompressOptions.of(None, {"keep": 0.5, "calibration": "self", name: "kept", "output": output})


def test_a_work_folder_lies_apart_from_a_calibration_cache() -> None:
    for cache in ("kept", "kept/cache"):
        with pytest.raises(BadInput, match="`work_dir` and `calibration_cache` are one folder"):
            CompressOptions(keep=0.5, calibration="self", work_dir="kept", calibration_cache=cache)
    CompressOptions(keep=0.5, calibration="self", work_dir="kept", calibration_cache="kept-cache", output="out")


def test_merge_refuses_what_contradicts() -> None:
    with pytest.raises(BadInput, match="one head"):
        MergeOptions(output="o", mode="sum", head="separate")


def test_an_error_that_begins_with_an_option_carries_it() -> None:
    names = {name for of in VERBS for name, _, _ in described(of)}
    for path in (ROOT / "compressor").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "BadInput"
                and node.args
            ):
                said = re.match(r"f?['\"]`(\w+)", ast.unparse(node.args[0]))
                if said and said[1] in names:
                    assert any(keyword.arg == "option" for keyword in node.keywords), f"{path}:{node.lineno}"


def test_a_recipe_in_a_mapping_is_known_to_come_from_the_options() -> None:
    [recipe] = CompressOptions(recipe={"optimizer": "sgd", "learning_rate": 0.1}).recipe
    assert isinstance(recipe, TrainingRecipe)
    assert recipe.sources == {"optimizer": "the options", "learning_rate": "the options"}


@pytest.mark.parametrize("written", ["8,4", (8, 4), [4, 8], "4, 8,4"])
def test_widths_are_read_alike_as_numbers_and_as_text(written: object) -> None:
    asked = CompressOptions(bits=written, keep=0.5)
    assert (asked.bits, asked.only_width) == ((8, 4), None)
    assert asked.command("m") == "compress m --keep 0.5 --bits 8,4"


def test_any_width_is_a_word_and_none_is_sixteen() -> None:
    assert (CompressOptions(bits="auto").bits, CompressOptions(bits="auto").command("m")) == (
        (),
        "compress m --bits auto",
    )
    assert replace(CompressOptions(bits="auto"), keep=0.5).bits == ()


@pytest.mark.parametrize(
    ("given", "with_data", "without"), [({}, (), (16,)), ({"bits": 16}, (16,), (16,)), ({"bits": "auto"}, (), ())]
)
def test_any_width_is_allowed_where_there_are_data_unless_others_are_asked_for(
    given: dict[str, int | str], with_data: tuple[int, ...], without: tuple[int, ...]
) -> None:
    asked = CompressOptions(**given)
    assert (asked.widths(calibrated=True), asked.widths(calibrated=False)) == (with_data, without)


@pytest.mark.parametrize("written", [1, 9, 0, "many", "", "8,", 4.5, True, [], "8;4"])
def test_a_width_that_no_number_has_is_refused_in_a_line(written: object) -> None:
    with pytest.raises(BadInput, match=r"^`bits` .* is no width; give 2 to 8, 16, several such as 8,4, or auto$"):
        CompressOptions(bits=written)


def test_one_width_alone_is_a_budget_that_may_be_calibrated_for() -> None:
    assert CompressOptions(bits=4).only_width == 4
    assert CompressOptions(bits=4, calibration="text.txt").may_calibrate_itself is False
    assert CompressOptions(bits=4).may_calibrate_itself
    assert not CompressOptions(bits=8).may_calibrate_itself
    assert CompressOptions(bits=8, keep=0.5).may_calibrate_itself
    assert not CompressOptions(bits="auto").may_calibrate_itself
    with pytest.raises(BadInput, match="shares a size"):
        CompressOptions(bits="8,4", calibration="text.txt")


def test_widths_contradict_a_plan() -> None:
    with pytest.raises(BadInput, match="bits"):
        CompressOptions(bits=4, plan="plan.json")


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.01", 0.01), (0.01, 0.01), ("2.5 %", 0.025)])
def test_a_drop_may_be_in_percent_and_stays_so(text: str | float, value: float) -> None:
    asked = CompressOptions(max_drop=text, data="builtin:digits")
    assert asked.max_drop == pytest.approx(value)
    in_percent = str(text).endswith("%")
    assert ("%" in asked.command("m")) == in_percent
    for again in (replace(asked), CompressOptions(**asked.portable())):
        assert again.max_drop == asked.max_drop
        assert isinstance(again.max_drop, Percent) == in_percent
