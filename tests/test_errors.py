"""The errors that the commands turn into exit statuses."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

import compressor
from compressor import BadInput, MergeRefused, Merging

ROOT = Path(compressor.__file__).parent
# A command is quoted as it is typed, and other programs have flags of their own.
COMMANDS = re.compile(r"'compress [^']*'|hf download|git lfs|vLLM|vllm|--local-dir")


def test_bad_input_comes_back_whole_from_a_worker_process() -> None:
    error = BadInput("no such layer", where="model.safetensors", remedy="name another")
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.what, back.where, back.remedy) == (str(error), error.what, error.where, error.remedy)


def test_a_refused_merge_comes_back_whole_from_a_worker_process() -> None:
    error = MergeRefused("a task loses 0.2", merging=cast(Merging, {"tasks": [0.2]}))
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), back.merging) == (MergeRefused, str(error), error.merging)


def texts_of_errors(path: Path) -> Iterator[tuple[int, str]]:
    """The texts in `raise` statements, in calls of an error's class, and in what is assigned to `what` and `remedy`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        named = isinstance(node, ast.Assign) and any(
            isinstance(each, ast.Name) and each.id.lower() in ("what", "remedy", "_remedy") for each in node.targets
        )
        called = (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("BadInput", "QualityGateNotMet", "CompressorError", "MergeRefused")
        )
        if named or called or isinstance(node, ast.Raise):
            for inside in ast.walk(node):
                if isinstance(inside, ast.Constant) and isinstance(inside.value, str):
                    yield inside.lineno, inside.value


@pytest.mark.parametrize("room", sorted(path.name for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()))
def test_no_error_names_a_flag_of_the_command_line(room: str) -> None:
    place = ROOT / room
    paths = [place] if place.is_file() else [path for path in place.rglob("*.py") if "cli" not in path.parts]
    found = {
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in paths
        for line, text in texts_of_errors(path)
        if re.search(r"(^|[\s(,])--[a-z]", COMMANDS.sub("", text)) and not COMMANDS.search(text)
    }
    assert not found
