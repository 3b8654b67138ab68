"""The rooms of the package, top to bottom, and what they import; `python -m docs.design.rooms` draws them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUNDATIONS = (
    *("version", "errors", "choices", "formatting", "display", "system_errors", "progress", "torch_state"),
    *("documents", "arguments", "free_memory", "freed_memory"),
)
ROOMS = (
    *(
        "recipe",
        "io",
        "engine",
        "network",
        "data",
        "measure",
        "initial",
        "factorize",
        "quantize",
        "encodings",
        "latency",
        "forms",
        "planning",
        "lowrank",
        "model",
        "evaluation",
    ),
    *(
        "calibration",
        "adapters",
        "fine_tuning",
        "merging",
        "diagnosis",
        "exporting",
        "archiving",
        "results",
        "report",
        "api",
    ),
    *("registration", "integrations", "cli"),
)


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its dotted name, without the package's."""
    for folder, prefix in ((ROOT / "compressor", ()), (ROOT / "cli", ("cli",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


SOURCES = dict(modules())


def imported(path: Path, *, on_import: bool = False) -> Iterator[str]:
    """The modules of the package that a file imports: anywhere in it, or only when it is itself imported.

    The package itself, from which the public names come, has an empty name.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if on_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [each.name for each in node.names if each.name.partition(".")[0] == "compressor"]
            yield from (name.removeprefix("compressor").removeprefix(".") for name in named)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"{path} imports by a relative name, line {node.lineno}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "compressor":
            module = (node.module or "").removeprefix("compressor").removeprefix(".")
            for each in node.names:
                name = f"{module}.{each.name}".removeprefix(".")
                yield name if name in SOURCES else module


def room(module: str) -> str:
    """The room of a module; the foundations, small modules at the top of the package, are one room."""
    name = module.partition(".")[0]
    return "foundations" if name in FOUNDATIONS else name


def arrows() -> dict[tuple[str, str], int]:
    """How many modules of a room import another room."""
    found: dict[tuple[str, str], int] = {}
    for module, path in SOURCES.items():
        for other in {room(name) for name in imported(path) if name} - {room(module), ""}:
            if module:
                found[room(module), other] = found.get((room(module), other), 0) + 1
    return found


def draw(target: Path) -> None:
    """Draw the import graph as a matrix: how many modules of the room of a row import the room of a column.

    An arrow up would be a red cell right of the diagonal.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    rooms = ("foundations", *ROOMS)
    place = {name: number for number, name in enumerate(rooms)}
    figure, axes = plt.subplots(figsize=(9, 8))
    for (importing, imported_room), count in arrows().items():
        row, column = place[importing], place[imported_room]
        color = "steelblue" if column < row else "firebrick"
        shade = min(0.9, 0.2 + 0.07 * count)
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=color, alpha=shade, edgecolor="white"))
        axes.text(column, row, str(count), ha="center", va="center", fontsize=7)
    for number, name in enumerate(rooms):
        held = sum(1 for module in SOURCES if module and room(module) == name)
        axes.add_patch(Rectangle((number - 0.5, number - 0.5), 1, 1, facecolor="0.85", edgecolor="white"))
        axes.text(number + 0.7, number, f"{name} ({held})", ha="left", va="center", fontsize=9)
    axes.set_xticks(range(len(rooms)), rooms, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rooms)), rooms, fontsize=8)
    axes.xaxis.tick_top()
    axes.set(xlim=(-0.5, len(rooms) + 2.5), ylim=(len(rooms) - 0.5, -0.5), aspect="equal")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "A cell: how many modules of the room on the left import the one above. In parentheses: a room's modules."
    )
    with plt.rc_context({"svg.hashsalt": "rooms"}):
        figure.savefig(target, bbox_inches="tight", metadata={"Date": None} if target.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("rooms.svg"))
