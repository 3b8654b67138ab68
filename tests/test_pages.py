"""Every block of the pages runs: commands and Python in a folder where tiny models stand for the names in them.

A block that cannot run here says why in a comment above it: `<!-- not run: REASON -->`. What a command printed is
recorded (`docs/outputs.py`), or a script (`docs/tables.py`), and other text is marked too.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
import yaml

import compressor
from compressor.cli.commands import app
from compressor.cli.routes import route
from compressor.cli.run import run
from tests import page_models

ROOT = Path(__file__).parents[1]
# Generated of the options, whose own examples are tested with them.
GENERATED = ROOT / "docs" / "reference" / "options.md"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {GENERATED}))
FENCE = re.compile(r"^( *)(```+)(\w*)$")
MARK = re.compile(r"^<!-- (not run|output|table): *(.*?) *-->$")
LANGUAGES = {"sh", "python", "yaml", "json", "text"}
# What a word in capitals stands for, and where it stands for something else on one page.
NAMES = {
    "MODEL": "model",
    "DATA": "train.txt",
    "ADAPTER": "adapter-a",
    "TUNED": "tuned",
    "ORIGINAL": "original",
    "SMALL": "model-compressed",
    "CHECKPOINT": "untrained",
    "A": "a.safetensors",
    "B": "b.safetensors",
}
NAMES_ON = {
    "docs/adapters.md": {"A": "adapter-a", "B": "adapter-b"},
    "docs/quality-gates.md": {"model_cards/digits-resnet": "model_cards/digits-vit"},
}
NAMES_IN_EXPORT = {"ADAPTER": "adapter-of-unet"}  # the names of others are those of diffusion models
# As documented, but on fewer examples and with the least work, and in one worker.
CHEAPER = {
    "--calibration": ["--effort", "fast", "--calibration-samples", "8", "--calibration-length", "32", "--bits", "16"],
    "--data": ["--data-samples", "16"],
}
SIZES = {"--keep", "--max-size"}
LANGUAGE_MODELS = {"model", "model/"}
FOLDERS = LANGUAGE_MODELS | {"model_cards/digits-vit", "model_cards/stdlib-llama"}
OF_SPEED = {"speed", "--max-latency", "--target-device"}
# What asks for a quality or a speed that random weights and layers as small as those here may not have: then nothing is
# written, with exit status 3.
GATES = OF_SPEED | {"--max-drop", "--tolerance"}


@dataclass(frozen=True)
class Block:
    """A block of a page, and the mark above it."""

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    name = page.relative_to(ROOT).as_posix()
    begun: tuple[str, int, str, list[str]] | None = None
    above = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if begun is None and fence:
            begun = (fence[2], number, fence[3], [])
        elif begun is not None and line.strip() == begun[0]:
            _, first, language, lines = begun
            mark = MARK.match(above)
            yield Block(name, first, language, "\n".join(lines) + "\n", *(mark.groups() if mark else ()))
            begun, above = None, ""
        elif begun is not None:
            begun[-1].append(line)
        elif line.strip():
            above = line.strip()
    assert begun is None, f"{name}: a block does not end"


BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_runs_or_says_why_not(block: Block) -> None:
    assert block.language in LANGUAGES, "name the language of the block"
    if block.language == "text":
        assert block.mark, "text is what docs/outputs.py recorded, or says why it is there"
    if block.mark:
        assert len(block.reason) > 8, "a block that does not run says why"
    if block.language == "python":
        ast.parse(block.text)
    if block.language == "yaml":
        yaml.safe_load(block.text)
    if block.language == "json" and not block.mark:
        json.loads(block.text)


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_few_blocks_do_not_run() -> None:
    code = [block for block in BLOCKS if block.language in ("sh", "python")]
    assert len(code) > 40
    assert sum(block.mark == "not run" for block in code) < len(code) / 5


def lines(block: Block) -> list[list[str]]:
    """The words of each command of a block."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sh"], ids=str)
def test_a_command_has_options_that_exist(block: Block) -> None:
    """Also where the block does not run here."""
    for program, *words in lines(block):
        if program == "compress":
            _command(words).make_context("compress", list(route(words).words))


def masked(text: str) -> str:
    """A text without its digits, which differ by a little from machine to machine."""
    return re.sub(r"\d", "0", "\n".join(line.rstrip() for line in text.strip("\n").splitlines()))


def expected(words: list[str]) -> set[int]:
    asks = set(words) & (GATES | SIZES | {"--bits", "--plan", "--config"})
    return {0, 3} if asks & GATES or (not asks and words[0] in ("MODEL", "plan")) else {0}


class Page:
    """The folder in which the blocks of one page run, one after another."""

    def __init__(self, name: str, printed: Callable[[], str] = str) -> None:
        """`printed` gives what commands have printed since it was last asked."""
        self._printed = printed
        self._exact = False
        self._names = NAMES | NAMES_ON.get(name, {})
        self._values: dict[str, Any] = {}
        self._programs: dict[str, Callable[[list[str]], int]] = {
            "compress": self._compress,
            "pip": _extras_exist,
            "make": _targets_exist,
            "python": self._script,
        }

    def run(self, block: Block, *, exact: bool = False) -> None:
        """`exact`: with all of the work, because what is printed is compared."""
        if block.mark == "not run":
            return
        if block.mark == "output":
            assert masked(self._printed()) == masked(block.text), "run `python -m docs.outputs` and `... docs.tables`"
        elif block.language == "python":
            self._python(block)
        elif block.language == "sh":
            for program, *words in lines(block):
                self._printed()
                self._exact = exact
                status = self._programs[program](words)
                assert status in expected(words), f"{block}: {shlex.join([program, *words])} ended with {status}"

    def _compress(self, words: list[str]) -> int:
        names = self._names | (NAMES_IN_EXPORT if words[0] == "export" else {})
        after = ["", *words]
        given = [
            word if at in ("-o", "--output") else names.get(word, word) for at, word in zip(after, words, strict=False)
        ]
        given = [path for word in given for path in _expanded(word)]
        if any("--overwrite" in parameter.opts for parameter in _command(given).params):
            given += ["--overwrite"]  # a block shows several ways to do one thing
        return run(given if self._exact else _cheaper(given))

    def _script(self, words: list[str]) -> int:
        before = sys.argv
        sys.argv = [self._names.get(word, word) for word in words]
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            sys.argv = before
        return 0

    def _python(self, block: Block) -> None:
        torch.manual_seed(0)
        self._values = {**_values(), **self._values}
        exec(compile(block.text, str(block), "exec"), self._values)


def _cheaply(compress: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with less work, for what Python on the pages asks of it."""

    def call(model: Any, *options: Any, **given: Any) -> Any:
        if given.get("calibration") is not None:
            given = {"effort": "fast", "bits": "16", **given}
        elif "keep" in given:
            given["calibration"] = "none"
        if {"keep", "max_drop"} & set(given):
            given.setdefault("prefer", "size")
        return compress(model, *options, **given | ({"overwrite": True} if "output" in given else {}))

    return call


def _expanded(word: str) -> list[str]:
    """The paths that a shell makes of a word."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def _command(words: list[str]) -> Any:
    return typer.main.get_group(app).commands[route(words).command]


def _cheaper(words: list[str]) -> list[str]:
    """A command with less work, where it does not say itself how much."""
    given = list(words)
    own_examples = given[0] in LANGUAGE_MODELS and not {"--calibration", "--config"} & set(given)
    if own_examples and SIZES & set(given) and not {"--bits", "--initial"} & set(given):
        given += ["--calibration", "self"]  # what is done unasked
    if given[0] in FOLDERS and not ({"--prefer"} | OF_SPEED) & set(given):
        given += ["--prefer", "size"]
    for option, others in CHEAPER.items():
        for name, value in zip(others[::2], others[1::2], strict=True):
            fits = option in given and name not in given and not (name == "--bits" and "--base" in given)
            given += [name, value] if fits else []
    without = (own_examples and {"--bits", "--initial"} & set(given)) or given[0] == NAMES["SMALL"]
    if without and "--calibration" not in given:
        given += ["--calibration", "none"]
    return [re.sub(r"^processes:\d+$", "processes:1", word) for word in given]


def _extras_exist(words: list[str]) -> int:
    [verb, what] = words
    assert verb == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(what.partition("[")[2].rstrip("]").split(",")) <= set(extras)
    return 0


def _targets_exist(words: list[str]) -> int:
    return subprocess.run(["make", "-n", "-C", ROOT, *words], stdout=subprocess.DEVNULL, check=False).returncode


def _values() -> dict[str, Any]:
    """The values that Python on the pages has from the reader's own code."""
    network = page_models.network()
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 2) for _ in range(8)]
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    return {
        "network": network,
        "module": network,
        "build_network": page_models.network,
        "Net": page_models.network,
        "train_loader": batches[:4],
        "test_loader": batches[4:],
        "loader": batches[:4],
        "llm": model,
        "texts": [page_models.text(seed, 400) for seed in range(4)],
        "tokenizer": transformers.AutoTokenizer.from_pretrained("model"),
        "f1": lambda model, batches: 0.5,
        "model": model,
        "torch": torch,
        "Trainer": transformers.Trainer,
        "arguments": transformers.TrainingArguments("RUN", report_to=[], max_steps=1, use_cpu=True),
        "data": [],
    }


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, tokenizer: transformers.PreTrainedTokenizerFast) -> Path:
    place = tmp_path_factory.mktemp("pages")
    page_models.make(place, tokenizer)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({block.page for block in BLOCKS}))
def test_the_blocks_of_a_page_run(
    name: str,
    stand_ins: Path,
    tmp_path: Path,
    *,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(stand_ins, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(compressor, "compress", _cheaply(compressor.compress))
    page = Page(name, lambda: capsys.readouterr().out)
    own = [block for block in BLOCKS if block.page == name]
    for block, after in zip(own, [*own[1:], None], strict=True):
        page.run(block, exact=after is not None and after.mark == "output")
