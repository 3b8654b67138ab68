"""Integers chosen one after another, the error of each carried to the later ones of its row and of its column."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Levels:
    """What each number of a matrix can become: a scale times an integer from `lowest` to `highest`, all `m x n`."""

    scales: Tensor
    lowest: Tensor
    highest: Tensor


@dataclass(frozen=True)
class Feedback:
    """What is done to the later numbers: two matrices that are zero on and below the diagonal.

    The change of a number at column j is added, times row j of `columns` (`n x n`), to the targets of its row. How far
    a number at row i is from its target is taken, times row i of `rows` (`m x m`), from what is rounded in its column.
    `rows` is None where the rows do not depend on each other.
    """

    columns: Tensor
    rows: Tensor | None


def rounded_in_turn(targets: Tensor, levels: Levels, feedback: Feedback, *, before: Tensor, block: int) -> Tensor:
    """The integers nearest to `m x n` targets, which change with each that is chosen.

    Args:
        targets: What is best for each number while the others stay as they were.
        levels: What it can become.
        feedback: What is done to the later ones.
        before: What the numbers were.
        block: Rows and columns of a block: from one to another changes are carried by matrix products.
    """
    if feedback.rows is None:
        return _by_columns(targets, levels, feedback.columns, before=before, block=block)
    return _by_antidiagonals(targets, levels, feedback, before=before, block=block)


def _by_columns(targets: Tensor, levels: Levels, feedback: Tensor, *, before: Tensor, block: int) -> Tensor:
    """The same where rows do not depend on each other: a column of all at once."""
    integers, changes = torch.empty_like(targets), torch.empty_like(targets)
    for start in range(0, targets.shape[1], block):
        part = slice(start, start + block)
        wanted = targets[:, part] + changes[:, :start] @ feedback[:start, part]
        for place, column in enumerate(wanted.unbind(1), start):
            scales = levels.scales[:, place]
            integer = (column / scales).round_().clamp_(levels.lowest[:, place], levels.highest[:, place])
            change = integer * scales - before[:, place]
            integers[:, place], changes[:, place] = integer, change
            wanted.addr_(change, feedback[place, part])
    return integers


def _by_antidiagonals(targets: Tensor, levels: Levels, feedback: Feedback, *, before: Tensor, block: int) -> Tensor:
    """The same where they do: what is at row i and column j does not depend on others with the same i + j."""
    grid = _Grid.of(targets.shape, block)
    wanted, start, lowest, highest = (grid.padded(each) for each in (targets, before, levels.lowest, levels.highest))
    scales = grid.padded(levels.scales, fill=1.0)
    columns = pad(feedback.columns, (0, wanted.shape[1] - targets.shape[1]) * 2)
    assert feedback.rows is not None
    rows = pad(feedback.rows, (0, wanted.shape[0] - targets.shape[0]) * 2)
    integers, changes, errors = (torch.empty_like(wanted) for _ in range(3))
    for diagonal in range(grid.down + grid.across - 1):
        # The blocks whose places down and across add up to this.
        down = list(range(max(0, diagonal - grid.across + 1), min(grid.down, diagonal + 1)))
        places = [(grid.rows(i), grid.columns(diagonal - i)) for i in down]
        tiles = _Tiles(
            targets=torch.stack(
                [torch.addmm(wanted[i, j], changes[i, : j.start], columns[: j.start, j]) for i, j in places]
            ),
            carried=torch.stack([errors[: i.start, j].T @ rows[: i.start, i] for i, j in places]),
            columns=torch.stack([columns[j, j] for _, j in places]),
            rows=torch.stack([rows[i, i] for i, _ in places]),
            levels=Levels(*(torch.stack([each[i, j] for i, j in places]) for each in (scales, lowest, highest))),
            before=torch.stack([start[i, j] for i, j in places]),
        )
        found = tiles.rounded()
        for tile, (i, j) in enumerate(places):
            integers[i, j], changes[i, j], errors[i, j] = (each[tile] for each in found)
    return integers[: targets.shape[0], : targets.shape[1]]


@dataclass(frozen=True)
class _Grid:
    """How a matrix is cut into blocks: how many of them lie below and beside each other, and their sides."""

    down: int
    across: int
    height: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, ...], block: int) -> _Grid:
        height, width = min(block, shape[0]), min(block, shape[1])
        return cls(-(-shape[0] // height), -(-shape[1] // width), height, width)

    def rows(self, place: int) -> slice:
        return slice(place * self.height, (place + 1) * self.height)

    def columns(self, place: int) -> slice:
        return slice(place * self.width, (place + 1) * self.width)

    def padded(self, matrix: Tensor, *, fill: float = 0.0) -> Tensor:
        """A matrix made as large as its blocks."""
        missing = self.down * self.height - matrix.shape[0], self.across * self.width - matrix.shape[1]
        return pad(matrix, (0, missing[1], 0, missing[0]), value=fill)


@dataclass(frozen=True)
class _Tiles:
    """Blocks that do not depend on each other, `tiles x height x width`; `carried` is `tiles x width x height`."""

    targets: Tensor
    carried: Tensor
    columns: Tensor
    rows: Tensor
    levels: Levels
    before: Tensor

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Their integers, their changes, and how far they are from their targets, an antidiagonal at a time."""
        _, height, width = self.targets.shape
        integers = torch.empty_like(self.targets)
        # With its columns in the opposite order an antidiagonal takes neighbors of both matrices.
        columns, carried = self.columns.flip(1), self.carried.flip(1)
        for turn in range(height + width - 1):
            first, last = max(0, turn - width + 1), min(height - 1, turn)
            rows = slice(first, last + 1)
            flipped = slice(width - 1 - turn + first, width - turn + last)

            # Rows `first` to `last` of the antidiagonal, in memory.
            size, strides, offset = (len(columns), last + 1 - first), (height * width, width - 1), first * (width - 1)
            at = partial(torch.as_strided, size=size, stride=strides, storage_offset=offset + turn)
            wanted, scales = at(self.targets), at(self.levels.scales)
            from_above = carried[:, flipped, rows].diagonal(dim1=1, dim2=2)
            integer = ((wanted - from_above) / scales).round_()
            integer = integer.clamp_(at(self.levels.lowest), at(self.levels.highest))
            at(integers).copy_(integer)
            number = integer.mul_(scales).unsqueeze(2)
            carried[:, flipped].addcmul_(number - wanted.unsqueeze(2), self.rows[:, rows])
            self.targets[:, rows].addcmul_(number - at(self.before).unsqueeze(2), columns[:, flipped])
        # Nothing is added to the target of a number after it is chosen.
        numbers = integers * self.levels.scales
        return integers, numbers - self.before, numbers - self.targets
