"""The card of a compressed folder: front matter that the hub's own parser reads, and a recipe that comes back."""

from __future__ import annotations

import ast
import re
import string
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import compressor
from compressor.api.write import Output
from compressor.cli.run import run
from compressor.errors import BadInput
from compressor.planning import Budget, LayerPlan, Plan
from compressor.recipe import TrainingRecipe, find_recipe, read_model_card
from compressor.recipe.card import front_matter, hyperparameter_lines
from compressor.report.model_card import compressed_card, model_card, restored_card
from compressor.results import BeforeAfter, Compression
from tests.measured import without_times

ORIGINAL = """\
---
license: apache-2.0
language: [en, de]
datasets: [org/words]
tags: [words, causal]
model-index:
- name: dense
  results:
  - task: {type: text-generation}
    dataset: {type: words, name: Words}
    metrics: [{type: perplexity, value: 1.5}]
---

# The dense one

It was trained with love.
"""
FLAGS = [
    *("--lr", "0.3", "--weight-decay", "0.05", "--optimizer", "sgd", "--momentum", "0", "--batch-size", "2"),
    *("--steps", "700", "--schedule", "constant"),
]


def written_model(folder: Path, card: str | None) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "metrics.json").write_text('{"perplexity": 1.5}')
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, data, the model compressed and evaluated by the command, and dense again."""
    place = tmp_path_factory.mktemp("cards")
    model = written_model(place / "dense", ORIGINAL)
    np.savez(place / "words.npz", input_ids=np.random.default_rng(0).integers(3, 30, (6, 8)))
    data = str(place / "words.npz")
    asked = [str(model), "--keep", "0.7", "--calibration", "none", "--prefer", "size", "--exclude", "*.q_proj"]
    assert run([*asked, "--data", data, "-o", str(place / "small"), "-q", *FLAGS]) == 0
    compressor.restore(place / "small", output=place / "again")
    return place


@pytest.fixture(scope="module")
def card(place: Path) -> ModelCard:
    return ModelCard.load(place / "small" / "README.md")


@pytest.mark.slow
def test_the_hub_reads_the_front_matter_and_finds_what_was_measured(place: Path, card: ModelCard) -> None:
    data = card.data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("dense", "quantized", "transformers")
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en", "de"], ["org/words"])
    assert set(data.tags) >= {"words", "causal", "low-rank", "compressor"}
    # The original's 1.5 is no figure of these weights.
    [result] = data.eval_results
    measured = compressor.evaluate(place / "small", data=place / "words.npz").compressed
    assert (result.metric_type, result.metric_value) == ("perplexity", pytest.approx(measured, abs=1e-6))
    assert (result.task_type, result.dataset_name, data.model_name) == ("text-generation", "words.npz", "small")


@pytest.mark.slow
def test_the_verdict_is_first_and_what_is_worse_is_named(place: Path, card: ModelCard) -> None:
    first, *_ = card.content.partition("# small\n\n")[2].splitlines()
    asked = {"keep": 0.7, "calibration": "none", "exclude": ["*.q_proj"], "prefer": "size"}
    found = compressor.compress(place / "dense", dry_run=True, **asked)
    assert re.match(
        rf"\*\*\d+ % {str(found.verdict).split()[-1]}, \d.*x latency.*, perplexity [\d.]+ -> [\d.]+\.\*\*", first
    )
    assert "| memory of a batch |" in card.text
    assert "| latency, batch 1 |" in card.text
    assert re.search(r"Memory and latency were measured on cpu \(\d+ threads?\)", card.text)
    larger = replace(found, bytes=BeforeAfter(1000, 1300))
    text = model_card(larger, name="small", base_model="dense", config=None, original="")
    assert "**30 % larger.** Worse than the dense model: size." in text
    assert "| weight files | 1 kB | 1.3 kB | **130.0 %** |" in text


@pytest.mark.slow
def test_the_text_tells_how_it_was_made_and_keeps_the_original(place: Path, card: ModelCard) -> None:
    recipe = "--optimizer sgd --lr 0.3 --weight-decay 0.05 --momentum 0 --batch-size 2 --schedule constant"
    [command] = re.findall(r"^compress .*$", card.text, re.MULTILINE)
    assert sorted(command.split()) == sorted(
        f"compress dense --keep 0.7 --prefer size --calibration none {recipe} --steps 700 --data words.npz"
        " --exclude '*.q_proj'".split()
    )
    assert "It was trained with love." in card.text
    plan = compressor.compress(
        place / "dense", keep=0.7, calibration="none", exclude=["*.q_proj"], dry_run=True, prefer="size"
    ).plan
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| `.*$", card.text, re.MULTILINE)]
    assert [(row[0], row[2]) for row in rows] == [
        (f"`{layer.name}`", "-" if layer.rank is None else str(layer.rank)) for layer in plan.layers
    ]
    size = sum(path.stat().st_size for path in (place / "small").glob("*.safetensors"))
    assert f"| {size / 1e3:.3g} kB |" in card.text
    for library in ("torch", "transformers"):
        assert f"- {library} {version(library)}" in card.text


def test_the_two_lines_load_it(place: Path, card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(code.strip().splitlines()) == 2
    monkeypatch.chdir(place)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    tokens = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        loaded, again = (
            model(input_ids=tokens).logits
            for model in (namespace["model"], transformers.AutoModelForCausalLM.from_pretrained(place / "again"))
        )
    torch.testing.assert_close(loaded, again, rtol=0, atol=1e-5)


def test_the_recipe_of_the_flags_is_found_in_the_card_and_in_that_of_the_dense_folder(place: Path) -> None:
    recipes = [find_recipe(place / folder) for folder in ("small", "again")]
    assert recipes[0] == recipes[1]
    known = {name: value for name, value in recipes[0].to_dict().items() if value is not None and name != "sources"}
    assert known == {
        "optimizer": "sgd",
        "learning_rate": 0.3,
        "weight_decay": 0.05,
        "momentum": 0.0,
        "batch_size": 2,
        "steps": 700,
        "schedule": "constant",
    }
    # A model compressed from a dense one was not trained from it: the start is known as before.
    inspected = compressor.inspect(place / "again").layers
    assert all(each.initialization.edge is not None for each in inspected if each.initialization is not None)
    assert (
        compressor.compress(place / "again", dry_run=True, keep=0.5, calibration="none", prefer="size").recipe
        == recipes[0]
    )


def test_a_dense_folder_is_no_longer_called_compressed_and_other_cards_are_left_alone(place: Path) -> None:
    text = (place / "again" / "README.md").read_text(encoding="utf-8")
    assert ("## Dense again" in text, "## How to load it" in text) == (True, False)
    assert "**" not in text.partition("# small")[2].partition("##")[0]
    assert ModelCard(text).data.to_dict() == ModelCard.load(place / "small" / "README.md").data.to_dict()
    assert restored_card(ORIGINAL) == ORIGINAL
    assert restored_card("no front matter\n## How to load it\n") == "no front matter\n## How to load it\n"


def test_a_fine_tune_stays_one(tmp_path: Path) -> None:
    model = written_model(tmp_path / "tuned", "---\nbase_model: org/start\n---\n# Tuned\n")
    compressor.compress(model, keep=0.7, calibration="none", output=tmp_path / "small", prefer="size")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.base_model == "tuned"
    assert find_recipe(tmp_path / "small").base_model == find_recipe(model).base_model == "org/start"


@pytest.mark.slow
def test_the_same_input_gives_the_same_card_without_paths_of_the_machine(place: Path, tmp_path: Path) -> None:
    for run_of in ("one", "two"):
        (tmp_path / run_of).mkdir()
        compressor.compress(
            place / "dense",
            keep=0.7,
            calibration="none",
            data=place / "words.npz",
            output=tmp_path / run_of / "small",
            prefer="size",
        )
    first, second = (tmp_path / run_of / "small" / "README.md" for run_of in ("one", "two"))
    assert without_times(first.read_text(encoding="utf-8")) == without_times(second.read_text(encoding="utf-8"))
    assert str(tmp_path.parent) not in first.read_text(encoding="utf-8")
    assert "/cards" not in (place / "small" / "README.md").read_text(encoding="utf-8")


def test_a_folder_without_a_card_gets_one_and_a_file_gets_none(tmp_path: Path) -> None:
    model = written_model(tmp_path / "bare", None)
    compressor.compress(model, keep=0.7, calibration="none", prefer="size")
    card = ModelCard.load(tmp_path / "bare-compressed" / "README.md")
    assert (card.data.license, card.data.eval_results) == (None, None)
    assert "Training hyperparameters" not in card.text
    (tmp_path / "file").mkdir()
    compressor.compress(model / "model.safetensors", keep=0.7, output=tmp_path / "file" / "small.safetensors")
    assert [path.name for path in (tmp_path / "file").iterdir()] == ["small.safetensors"]


def test_metadata_that_cannot_be_read_are_not_lost_in_silence(tmp_path: Path, caplog: Any) -> None:
    model = written_model(tmp_path / "dense", "---\nlicense: [unclosed\n---\n# Mine\n")
    compressor.compress(model, keep=0.7, calibration="none", prefer="size")
    assert [r.message for r in caplog.records if "metadata of README.md of dense" in r.message]
    card = ModelCard.load(tmp_path / "dense-compressed" / "README.md")
    assert "license: [unclosed" in card.text
    assert card.data.base_model == "dense"


def compression(*names: str) -> Compression:
    layers = tuple(LayerPlan(name, (40, 30), "linear", 3, "plain", 210, 0.1, "its share | of it") for name in names)
    return Compression(
        source="dense",
        output="small",
        recipe=TrainingRecipe(),
        plan=Plan("dense", None, Budget("keep", 0.5), layers),
        parameters=BeforeAfter(2400, 420),
        bytes=BeforeAfter(9600, 1680),
        evaluation=None,
        seconds=1.0,
        peak_memory_bytes=10**6,
        skipped=(),
        spectra={},
        command="compress dense --keep 0.5",
    )


@pytest.mark.parametrize(
    "original",
    [
        "---\n---\n",
        "---\nlicense: [unclosed\n---\n# Kept\n",
        "---\n- a list\n---\n# Kept\n",
        "---\nlicense: mit\n",
        "---\ntags: alone\nmodel-index: nonsense\neval_results: 5\nignore_metadata_errors: yes\n---\n# Kept\n",
        "---\nbase: &a [*a]\n1: number\ndate: 2020-13-45\n---\n# Kept\n",
        "---\nmodel_name: x\nlibrary_name: 7\ntags: [3, {a: b}, fine]\n---\n# Kept\n",
        "---\nself: 1\nto_yaml: 1\nmodel-index: 7\nto_dict: 1\n__class__: 1\nlicense: {a: b}\n---\n# Kept\n",
        "---\nlibrary_name: [a]\npipeline_tag: {a: b}\ndatasets: {}\nmetrics: 3\n---\n# Kept\n",
        "---\nextra_gated_fields: &a {b: *a}\nlicense: &c [*c]\nlanguage: [[no]]\n---\n# Kept\n",
        '---\nauthor: "a\\n---\\nb: \\0 \\ud800"\nlicense_name: "---"\n---\n# Kept\n',
        "---\r\nlicense: mit\r\n---\r\n# Kept\r\n",
        "\ufeff---\nlicense: mit\n---\n# Kept\n",
        "# Kept\n\n### Training hyperparameters\n\n- learning_rate: much\n",
    ],
)
def test_any_card_of_the_original_gives_a_card_that_can_be_read(original: str) -> None:
    text = model_card(compression("a"), name="small", base_model="dense", config=None, original=original)
    card = ModelCard(text)
    assert card.data.base_model == "dense"
    assert {"low-rank", "compressor"} <= set(card.data.tags)
    assert (card.data.eval_results, card.data.library_name, card.data.pipeline_tag) == (None, "pytorch", None)
    text.encode("utf-8", errors="backslashreplace")
    assert ("# Kept" in original) == ("# Kept" in card.text)


KEPT = """\
---
language: [en, no]
license: other
license_name: own
datasets: org/words
metrics: [accuracy]
library_name: timm
pipeline_tag: image-classification
inference: false
extra_gated_fields: {Company: text, Use: {type: select, options: [Research, Other]}}
---
"""


def test_what_is_known_and_as_it_should_be_is_kept_and_what_is_not_is_named(caplog: pytest.LogCaptureFixture) -> None:
    text = model_card(compression("a"), name="small", base_model="dense", config={}, original=KEPT)
    assert not caplog.records
    data = ModelCard(text).data.to_dict()
    assert data["language"] == ["en", "no"]
    assert data["extra_gated_fields"] == {
        "Company": "text",
        "Use": {"type": "select", "options": ["Research", "Other"]},
    }
    assert (data["license"], data["license_name"], data["datasets"]) == ("other", "own", "org/words")
    assert (data["library_name"], data["pipeline_tag"], data["inference"]) == ("timm", "image-classification", False)
    assert data["metrics"] == ["accuracy"]
    alone = "---\nlanguage: no\nself: 1\nlicense: 3\ndatasets: [org/words, /home/me/words]\n---\n"
    text = model_card(compression("a"), name="small", base_model="dense", config={}, original=alone)
    data = ModelCard(text).data.to_dict()
    assert (data["language"], "license" in data, "self" in data) == ("no", False, False)
    assert [record.getMessage() for record in caplog.records] == [
        "metadata of the dense model's card that are not kept: self, license, datasets"
    ]


def test_a_card_that_is_too_long_or_none_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = compressor.open_checkpoint(written_model(tmp_path / "dense", None))
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "README.md").write_text("long " * 2**20)
    (tmp_path / "folder" / "README.md").mkdir(parents=True)
    card = partial(compressed_card, compression=compression("a"), source=source, name="small", config=None)
    for folder in ("long", "folder"):
        Output(tmp_path / folder, 0).write_card(card)
    assert "is not kept" in caplog.records[0].getMessage()
    assert "is a folder" in caplog.records[1].getMessage()
    assert ModelCard.load(tmp_path / "long" / "README.md").data.base_model == "dense"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
KEYS = st.sampled_from(["language", "license", "tags", "datasets", "model-index", "library_name", "self", "widget"])
METADATA = st.dictionaries(
    KEYS | st.text(max_size=5),
    st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4),
)


@pytest.mark.slow
@settings(max_examples=100)
@given(metadata=METADATA)
def test_no_metadata_stop_a_card(metadata: dict[str, Any]) -> None:
    original = f"---\n{yaml.safe_dump(metadata)}---\n# Kept\n"
    text = model_card(compression("a"), name="small", base_model="dense", config=None, original=original)
    card = ModelCard(text)
    assert card.data.base_model == "dense"
    assert card.text.endswith("# Kept\n")


@pytest.mark.parametrize(("method", "package"), [("compressor", "compressor"), ("compressed-tensors",) * 2])
def test_it_says_what_has_to_be_installed(method: str, package: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": method}}
    text = model_card(compression("a"), name="small", base_model="dense", config=config, original="")
    assert re.findall(r"pip install ([\w-]+)", text) == [package]


@pytest.mark.parametrize("name", ['we"ird', "it's", "back\\slash", "two\nlines", "x```y", "\u2028", "{config}"])
@pytest.mark.parametrize("config", [None, {}])
def test_the_lines_that_load_it_are_python_whatever_it_is_called(name: str, config: dict[str, Any] | None) -> None:
    text = model_card(compression("a"), name=name, base_model="dense", config=config, original="")
    [code] = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert name in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


def test_names_of_layers_stay_in_their_cells_and_names_of_models_are_names_of_the_hub() -> None:
    names = ["a|b", "`code` | more", "line\nbreak", "<script>alert(1)</script>", "[x](http://evil)"]
    text = model_card(compression(*names), name="small", base_model="My Model (v1)!", config={}, original="")
    rows = re.findall(r"^\| `.*$", text, re.MULTILINE)
    assert len(rows) == len(names)
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)
        assert len(cells) == 9
        # What is in a span of code is no markup.
        assert re.fullmatch(r" `[^`]+` ", cells[1])
    assert re.fullmatch(r"[\w.-]+", ModelCard(text).data.base_model)


GLOBS = st.lists(st.text(string.ascii_letters + "*._", min_size=1, max_size=8), max_size=3).map(tuple)
RECIPES = st.builds(
    TrainingRecipe,
    optimizer=st.none() | st.sampled_from(["sgd", "adamw", "adam", "lion", "sgdw"]),
    learning_rate=st.none() | st.floats(0, 1),
    weight_decay=st.none() | st.floats(0, 1),
    momentum=st.none() | st.floats(0, 0.99),
    dampening=st.none() | st.floats(0, 1),
    schedule=st.none() | st.sampled_from(["cosine", "linear", "step", "constant"]),
    warmup_steps=st.none() | st.floats(0.01, 0.9),
    step_milestones=st.none() | st.lists(st.integers(0, 900), max_size=3).map(sorted).map(tuple),
    batch_size=st.none() | st.integers(1, 10**9),
    steps=st.none() | st.integers(1000, 10**6),
    epochs=st.none() | st.floats(0.5, 100),
    dataset_size=st.none() | st.integers(1, 1000),
    undecayed=st.none() | GLOBS,
    group_weight_decay=st.none() | st.lists(st.tuples(st.sampled_from(["*.a", "b"]), st.floats(0, 1))).map(dict),
    base_model=st.none() | st.sampled_from(["org/name", "start"]),
)


@settings(max_examples=100)
@given(recipe=RECIPES)
def test_a_recipe_that_was_written_is_read_again(recipe: TrainingRecipe, tmp_path_factory: Any) -> None:
    lines = hyperparameter_lines(recipe)
    path = tmp_path_factory.getbasetemp() / "README.md"
    path.write_text("### Training hyperparameters\n\nAs follows:\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    assert read_model_card(path) == recipe


def test_what_a_line_could_not_say_is_left_out() -> None:
    recipe = TrainingRecipe(learning_rate=0.1, undecayed=("a,b",), base_model="two\nlines")
    assert hyperparameter_lines(recipe) == ["- learning_rate: 0.1"]


def test_the_base_of_a_quantized_model_is_not_where_training_started(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    for relation, base in (("", "org/name"), ("base_model_relation: finetune\n", "org/name")):
        path.write_text(f"---\nbase_model: org/name\n{relation}---\n")
        assert read_model_card(path).base_model == base
    path.write_text("---\nbase_model: org/name\nbase_model_relation: quantized\n---\n")
    assert read_model_card(path).base_model is None


def test_front_matter_is_what_stands_between_the_marks_and_no_more() -> None:
    assert front_matter("---\na: 1\n---\ntext\n---\n") == ({"a": 1}, "text\n---\n")
    assert front_matter("text\n---\na: 1\n---\n") == ({}, "text\n---\na: 1\n---\n")


def test_a_command_that_failed_leaves_no_card(place: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        compressor.compress(
            place / "dense",
            keep=0.7,
            calibration="none",
            output=tmp_path / "small",
            data=tmp_path / "none.npz",
            prefer="size",
        )
    assert not list(tmp_path.iterdir())


def test_a_card_with_an_infinite_perplexity_has_no_result_of_it(place: Path) -> None:
    evaluation = replace(compressor.evaluate(place / "small", data=place / "words.npz"), compressed=float("inf"))
    text = model_card(
        replace(compression("a"), evaluation=evaluation), name="small", base_model="dense", config=None, original=""
    )
    assert ModelCard(text).data.eval_results is None


def test_figures_of_the_dense_weights_are_not_in_the_compressed_folder(place: Path) -> None:
    assert (place / "dense" / "metrics.json").is_file()
    assert not (place / "small" / "metrics.json").exists()
