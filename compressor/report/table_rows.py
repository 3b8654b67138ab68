"""Rows of tables of layers, fewer where many say the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compressor.report.layer_groups import kinds_by_name

Row = tuple[str, ...]

# The number of an expert in the name of one of its layers.
_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..+)", re.DOTALL)
_NUMBER = re.compile(r"(-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)(.*)", re.DOTALL)


def rows_of_experts_together(rows: Sequence[Row], *, most: int = 8) -> tuple[Row, ...]:
    """Rows of layers by name, those of more than `most` experts that do the same in a block as one, at the first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        found = _EXPERT.fullmatch(row[0])
        groups.setdefault(row[0] if found is None else f"{found[1]}*{found[3]}", []).append(row)
    shown: list[Row] = []
    for group in groups.values():
        numbers = [int(found[2]) for row in group if (found := _EXPERT.fullmatch(row[0])) is not None]
        if len(numbers) <= most:
            shown += group
            continue
        name = _EXPERT.sub(rf"\g<1>{min(numbers)}-{max(numbers)}\g<3>", group[0][0])
        shown.append((name, *(_range(cells) for cells in list(zip(*group, strict=True))[1:])))
    return tuple(shown)


def _range(cells: Iterable[str]) -> str:
    """What is in several cells: the smallest and the largest number, or the different words."""
    different = list(dict.fromkeys(cells))
    if len(different) == 1:
        return different[0]
    found = [match for cell in different if (match := _NUMBER.fullmatch(cell)) is not None]
    if len(found) == len(different) and len({match[2] for match in found}) == 1:
        ordered = sorted((match[1] for match in found), key=lambda number: float(number.replace(",", "")))
        return f"{ordered[0]}-{ordered[-1]}{found[0][2]}"
    return ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")


WIDEST_CELL = 15


def rows_by_kind(rows: Sequence[Row], *, most: int) -> tuple[Row, ...]:
    """Rows of layers by name, those of a kind as one: how many they are, and the ranges of their numbers."""
    groups: dict[str, list[Row]] = {}
    for kind, row in zip(kinds_by_name([row[0] for row in rows], most=most), rows, strict=True):
        groups.setdefault(kind, []).append(row)
    return tuple(_summed(kind, group) for kind, group in groups.items())


def _summed(kind: str, group: Sequence[Row]) -> Row:
    if len(group) == 1:
        name, *cells = group[0]
        return (name, "1", *cells)
    cells = [_range(column) for column in list(zip(*group, strict=True))[1:]]
    return (kind, str(len(group)), *(cell if len(cell) <= WIDEST_CELL else "varies" for cell in cells))
