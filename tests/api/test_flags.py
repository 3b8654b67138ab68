"""What the library says in the words of Python, the command line says in its own."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import compressor
from compressor import TrainingRecipe
from compressor.api.flags import in_flags, with_flags
from compressor.api.option import described
from compressor.api.options import VERBS


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("`keep` and `max_size` are two budgets", "--keep and --max-size are two budgets"),
        ("ask for `keep=0.8`", "ask for --keep 0.8"),
        ("export it with `to='dense'` first", "export it with --to dense first"),
        ("the model that `factory` builds", "the model that --model builds"),
        ("`effort='fast'` is not for differences", "--effort fast is not for differences"),
        ("`embeddings=True` includes it", "--embeddings includes it"),
        ("`push_to` 'a b' is no name of the hub", "--push-to 'a b' is no name of the hub"),
        ("`calibration_length` or `recipe`", "--calibration-length or --recipe"),
        ("run `git lfs pull`", "run `git lfs pull`"),
        ("`model.state_dict()` and `nothing`", "`model.state_dict()` and `nothing`"),
    ],
)
def test_options_become_flags_and_other_code_stays(python: str, shell: str) -> None:
    assert with_flags(python) == shell


def test_every_option_of_python_has_a_flag() -> None:
    alone = {name for of in VERBS for name, option, _ in described(of) if option.only_python}
    of_python_alone = {"model", "options", "given"} | alone
    for verb in (compressor.compress, compressor.inspect):
        for name in set(inspect.signature(verb).parameters) - of_python_alone:
            assert with_flags(f"`{name}`").startswith("--"), name


def test_a_card_and_a_report_show_flags() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40))
    compression = compressor.compress(model, keep=0.5, recipe=TrainingRecipe(optimizer="adamw"), prefer="size")
    plan = replace(compression.plan, advice="give `calibration`")
    shown = in_flags(replace(compression, plan=plan, warnings=("take a smaller `max_drop`",)))
    assert shown.plan.advice == "give --calibration"
    assert shown.warnings == ("take a smaller --max-drop",)
    assert in_flags(compression).plan.layers == compression.plan.layers


# Among them what puts another size into the command that made a model.
STATING_FLAGS = ("kinds", "option", "options", "reference", "vllm", "other_sizes")
OF_OTHER_TOOLS = ("--enable-lora", "--max-lora-rank", "--local-dir", "---")


def test_the_library_names_no_flags() -> None:
    """But in quoted commands, and those of other tools."""
    package = Path(compressor.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        if path.parent.name in ("api", "integrations", "report") and path.stem in STATING_FLAGS:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                words = re.sub(r"'compress [^']*'", "", node.value)
                for other in OF_OTHER_TOOLS:
                    words = words.replace(other, "")
                if re.search(r"(^|\s|\()--[a-z]", words):
                    found.append(f"{path.relative_to(package)}:{node.lineno}: {words}")
    assert not found
