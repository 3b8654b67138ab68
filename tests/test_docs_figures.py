"""No measured figure is typed into a page: those in prose come from results, or are none and say what else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.outputs import commands
from docs.tables import OUTPUT, OUTPUTS, TABLE, VALUE, filled

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "reference" / "options.md"
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - {GENERATED})
UNITS = "s|ms|min|GB|MB|kB|GiB|MiB|%|nats|points?|seconds?|minutes?|hours?|times|x"
# A number with a unit, or with decimals; before the point of an arXiv number are four digits.
FIGURE = re.compile(rf"(?<![\w.`-])(?:\d[\d,.]*\s?(?:{UNITS})(?![\w`/])|\d{{1,3}}\.\d+(?!\w|\.\d))")
# Versions, which follow a name or another version.
PACKAGES = "Python|torch|transformers|diffusers|peft|compressed-tensors]?|gguf|onnx|onnxruntime|lm_eval|vLLM"
VERSIONS = re.compile(rf"\b(?:{PACKAGES}|version|capability) \d+\.\d+(?:\.\d+)?(?:(?:, | and )\d+\.\d+)*")
# What is no measurement: where it stands, and what it is.
ALLOWED = {
    "docs/adapters.md": {"90 %": "a column's definition", "99 %": "a column's definition"},
    "docs/claims.md": dict.fromkeys(
        ["3 %", "3.1", "3.2", "3.3", "0.01", "0.02", "0.10", "0.1"], "what the source says"
    ),
    "docs/command-line.md": {"2 MB": "a limit in the code"},
    "docs/design/README.md": {"60%": "an option's value", "40MB": "an option's value"},
    "docs/exports.md": {"2 GB": "a limit of the format"},
    "docs/faster-or-smaller.md": {"3 %": "a threshold in the code"},
    "docs/fine-tunes.md": {"2 %": "an example of bfloat16's arithmetic"},
    "docs/hyperparameters.md": {"99 %": "a rank's definition"},
    "docs/index.md": {"30 %": "an option's value"},
    "docs/language-models.md": {"0.1": "an option's value"},
    "docs/latency.md": {"3 %": "a threshold in the code"},
    "docs/limits.md": {"1 MB": "a limit in the code", "64 MB": "a limit in the code"},
    "docs/merging.md": {"0.01": "a hyperparameter of the benchmark"},
    "docs/recipes.md": {"0.05": "a threshold in the code", "0.1": "a threshold in the code"},
    "docs/results.md": {
        "5 %": "a threshold in the code",
        "0.05": "a threshold in the code",
        "0.1": "a threshold in the code",
        "6.4": "a size that the benchmark sets",
    },
}


def figures(text: str) -> Iterator[str]:
    """The figures in a page's prose, without what is generated, code, and the targets of links."""
    for generated in (TABLE, VALUE, OUTPUT):
        text = generated.sub("", text)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`|(?<=\])\([^)\n]*\)", "", text)
    yield from FIGURE.findall(VERSIONS.sub("", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_figure_comes_from_results(page: Path) -> None:
    allowed = ALLOWED.get(page.relative_to(ROOT).as_posix(), {})
    found = set(figures(page.read_text(encoding="utf-8")))
    assert found == set(allowed), "generate it (docs/tables.py), or say in ALLOWED what it is"


@pytest.mark.parametrize(
    "sentence",
    [
        "It takes 3.2 s.",
        "a loss of 0.6094",
        "loses 12 points",
        "saves 40% of 1,024 MB",
        "1.4x as fast",
        "It loses 2.8.",
    ],
)
def test_a_measured_figure_is_found(sentence: str) -> None:
    assert list(figures(sentence))


@pytest.mark.parametrize(
    "sentence", ["`--keep 40%`", "arXiv 2206.05794", "version 1.2.3", "gguf 0.18, 0.19", "in 4 bits"]
)
def test_other_numbers_are_not(sentence: str) -> None:
    assert not list(figures(sentence))


def test_a_value_is_that_of_the_results() -> None:
    wrong = "takes <!-- value: sharded.threads as .0f of memory.json -->7<!-- end --> threads"
    assert filled(wrong) == wrong.replace(">7<", ">1<")
    size = "<!-- value: sharded.checkpoint_bytes as GB of memory.json -->?<!-- end -->"
    assert ">4.04 GB<" in filled(size)


def test_outputs_are_of_the_commands_above_them() -> None:
    recorded = json.loads(OUTPUTS.read_text(encoding="utf-8"))["outputs"]
    assert {name: each["command"] for name, each in recorded.items()} == commands()
