"""How tests and benchmarks treat the package: they pass it settings and callables, and replace none of its insides.

The verbs on its public face may be stood in for, where it is tested with which arguments something calls them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
REPLACING = {"setattr", "delattr", "setitem", "delitem", "patch", "object", "dict"}  # of monkeypatch and of mock
REGISTERING = {"setitem", "delitem", "dict"}  # an entry in a table of the package, such as one more form


def is_package(name: str) -> bool:
    return name == "compressor" or name.startswith("compressor.")


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the package, and not a class or function in one."""
    parts = name.replace("compressor.cli", "cli").split(".")
    return is_package(name) and ((path := ROOT.joinpath(*parts)).is_dir() or path.with_suffix(".py").is_file())


def imported_modules(tree: ast.AST) -> set[str]:
    """The names in a file that stand for modules of the package."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname or each.name.partition(".")[0] for each in node.names if is_package(each.name)}
        elif isinstance(node, ast.ImportFrom) and is_package(node.module or ""):
            names |= {each.asname or each.name for each in node.names if is_module(f"{node.module}.{each.name}")}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called = node.value.args[0] if node.value.args else None
            if isinstance(called, ast.Constant) and is_module(str(called.value)):  # importlib.import_module
                names |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    return names


def imported_names(tree: ast.AST) -> set[str]:
    """The names in a file that stand for classes, functions, and values in modules of the package."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and is_package(node.module or "")]
    return {each.asname or each.name for node in nodes if node.module != "compressor" for each in node.names}


def root_of(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def replaced(source: str) -> Iterator[str]:
    """What a file replaces in the package: by a dotted name, or an attribute of a module, class, or function."""
    tree = ast.parse(source)
    modules = imported_modules(tree)
    names = modules | imported_names(tree)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        inside = modules
        if isinstance(node, ast.Call) and node.args:
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            targets = node.args[:1] if name in REPLACING else []
            inside = modules if name in REGISTERING else names
        elif isinstance(node, ast.Assign):
            targets, inside = [each.value for each in node.targets if isinstance(each, ast.Attribute)], names
        for target in targets:
            named = isinstance(target, ast.Constant) and is_package(str(target.value))
            face = isinstance(target, ast.Name) and target.id == "compressor"
            if named or isinstance(target, ast.JoinedStr) or (root_of(target) in inside and not face):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_of_the_package_is_replaced(path: Path) -> None:
    assert not list(replaced(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "line",
    [
        'monkeypatch.setattr("compressor.planning.budget.Budget", None)',
        'with mock.patch("compressor.api.compress"): pass',
        'monkeypatch.setattr(f"{ROOM}.Budget", None)',
        "monkeypatch.setattr(budget, 'Budget', None)",
        "setattr(budget, 'Budget', None)",
        "budget.Budget = None",
        "monkeypatch.setattr(Budget, 'option', None)",
        "Budget.option = None",
        "mock.patch.object(compressor.planning, 'Budget')",
        "with monkeypatch.context() as patched: patched.setattr(budget, 'Budget', None)",
    ],
)
def test_a_replacement_is_found(line: str) -> None:
    imports = "import compressor\nfrom compressor.planning import Budget, budget\n"
    assert len(list(replaced(imports + line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        'monkeypatch.setattr("sys.stdout", None)',
        "monkeypatch.setattr(os, 'fsync', None)",
        "monkeypatch.setenv('HOME', '')",
        "monkeypatch.setattr(compressor, 'compress', None)",
        "Budget('keep', 0.5)",
        "monkeypatch.setitem(FORMS, 'new', None)",
        "self.budget = None",
    ],
)
def test_anything_else_may_be_replaced(line: str) -> None:
    imports = (
        "import os\nimport compressor\nfrom compressor.forms import FORMS\nfrom compressor.planning import Budget\n"
    )
    assert not list(replaced(imports + line))
