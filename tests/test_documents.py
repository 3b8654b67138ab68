"""Documents of others: small ones give what the plain readers give, hostile ones a short refusal, soon."""

from __future__ import annotations

import json
import os
import resource
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compressor.data import load_preprocessing
from compressor.documents import parse_json, parse_yaml, read_json, read_regular_file, read_yaml
from compressor.errors import BadInput
from compressor.planning import read_plan
from compressor.recipe import find_recipe, read_model_card, read_recipe_file
from compressor.recipe.card import front_matter

scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(st.characters(codec="ascii"), max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def merged(levels: int) -> str:
    """Mappings that are each merged from ten times the one before."""
    lines = ["a0: &a0 {k: v}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level}\n  <<: [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines) + "\n"


HOSTILE_YAML = {
    "merge keys": merged(9),
    "one merge key of many": "a: &a {k: v}\nb:\n  <<: [" + "*a, " * 200_000 + "*a]\n",
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    "itself": "a: &a [*a]\n",
    "flow mappings": "{a: " * 25_000,
    "flow sequences": "[" * 100_000,
    "block sequences": "- " * 50_000,
    "complex keys": "? " * 50_000,
    "indentation": "".join(" " * level + "a:\n" for level in range(440)),
    "anchors": "&a " * 30_000,
    "a number of base 60": "learning_rate: 1" + ":1" * 500_000 + "\n",
    "thousands of digits": "learning_rate: " + "1" * 5000 + "\n",
    "many values": "a: [" + "x," * 300_000 + "x]\n",
    "names of one hash": "".join(f"{i * (2**61 - 1)}: 1\n" for i in range(1, 33_000)),
}
HOSTILE_JSON = {
    "depth": "[" * 50_000 + "]" * 50_000,
    "a depth that Python reads": '{"a":' * 500 + "1" + "}" * 500,
    "many values": '{"a": [' + "[]," * 2_000_000 + "[]]}",
    "thousands of digits": '{"a": ' + "1" * 5000 + "}",
    "wide characters": '{"a": "\N{GRINNING FACE}' + "x" * 2**24 + '"}',
}


@given(values)
def test_what_is_small_is_read_as_the_plain_readers_read_it(document: Any) -> None:
    assert parse_json(json.dumps(document), where="here") == document
    text = yaml.safe_dump(document)
    assert parse_yaml(text, where="here") == yaml.safe_load(text)


def test_anchors_and_merge_keys_of_everyday_files_are_read() -> None:
    text = "base: &base {lr: 0.1, wd: 0.01}\nrun:\n  <<: *base\n  wd: 0\nagain: *base\n"
    assert parse_yaml(text, where="here") == yaml.safe_load(text)
    assert parse_yaml(text, where="here")["run"] == {"lr": 0.1, "wd": 0}


@pytest.mark.parametrize("content", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_hostile_yaml_is_refused_within_a_second(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    card = tmp_path / "README.md"
    card.write_text(f"---\n{content}---\n# A model\n")
    began = time.process_time()
    with pytest.raises(BadInput) as caught:
        read_yaml(path)
    assert front_matter(card.read_text())[0] == {}
    assert time.process_time() - began < 2
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_hostile_json_is_refused_by_every_reader_in_little_memory(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    readers: list[Callable[[Path], object]] = [
        read_json,
        read_plan,
        read_recipe_file,
        lambda path: load_preprocessing(path.parent),
    ]
    for read in readers:
        tracemalloc.start()
        try:
            with pytest.raises(BadInput) as caught:
                read(path)
            assert tracemalloc.get_traced_memory()[1] < 200e6 + len(content)
        finally:
            tracemalloc.stop()
        assert len(str(caught.value)) < 500


def test_digits_are_refused_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(HOSTILE_JSON["thousands of digits"])
    with pytest.raises(BadInput, match=r"is not valid JSON \(a number of too many digits\)"):
        read_plan(tmp_path / "plan.json")


def test_files_that_are_read_unasked_cost_no_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("README.md", "recipe.yaml", "args.yaml"):
        (tmp_path / name).write_text(f"---\n{merged(9)}---\n" if name == "README.md" else merged(9))
    (tmp_path / "trainer_state.json").write_text(HOSTILE_JSON["depth"])
    (tmp_path / "recipe.json").write_text('{"learning_rate": 0.5}')
    began = time.process_time()
    assert find_recipe(tmp_path).learning_rate == 0.5
    assert time.process_time() - began < 2
    for name in ("recipe.yaml", "args.yaml", "trainer_state.json"):
        assert name in caplog.text


def test_hyperparameters_below_a_hostile_front_matter_are_read(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\n{merged(9)}---\n\n### Training hyperparameters\n\n- learning_rate: 0.5\n")
    assert read_model_card(card).learning_rate == 0.5


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing", "dangling", "large"])
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "plan.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_plan, lambda path: read_regular_file(path, 2**20)):
        with pytest.raises(BadInput) as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
