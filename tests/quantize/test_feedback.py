"""Errors carried along rows and columns are Babai's nearest plane in the Kronecker product of both moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.quantize.feedback import Feedback, Levels, rounded_in_turn


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(side: int, seed: int) -> Tensor:
    half = random(side, side, seed=seed)
    return half @ half.T + 0.1 * torch.eye(side)


def unit_upper(moment: Tensor) -> Tensor:
    """M of `M diag(.) M^T`."""
    factor = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1)
    return factor / factor.diagonal()


def levels(shape: tuple[int, int], scale: float, largest: float = 1e6) -> Levels:
    ones = torch.ones(shape, dtype=torch.float64)
    return Levels(scale * ones, -largest * ones, largest * ones)


def nearest_plane(matrix: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Babai's algorithm on the moment of all numbers, column by column, of which the first is rounded first."""
    triangular = torch.linalg.cholesky(torch.kron(inputs, gradients).flip(0, 1)).T
    wanted = matrix.T.flatten().flip(0)
    integers = torch.zeros_like(wanted)
    for place in reversed(range(len(wanted))):
        error = integers[place + 1 :] - wanted[place + 1 :]
        integers[place] = (wanted[place] - triangular[place, place + 1 :] @ error / triangular[place, place]).round()
    return integers.flip(0).reshape(matrix.shape[1], matrix.shape[0]).T


@pytest.mark.parametrize("shape", [(6, 9), (1, 7), (7, 1), (1, 1), (5, 4)])
@pytest.mark.parametrize("block", [1, 2, 4, 64])
def test_errors_of_both_sides_are_carried_as_babai_does(shape: tuple[int, int], block: int) -> None:
    matrix, inputs, gradients = 3 * random(*shape, seed=1), moment(shape[1], 2), moment(shape[0], 3)
    feedback = Feedback(unit_upper(inputs).triu(1).neg(), unit_upper(gradients).triu(1))
    found = rounded_in_turn(matrix, levels(shape, 1.0), feedback, before=matrix, block=block)
    assert torch.equal(found, nearest_plane(matrix, inputs, gradients))


@pytest.mark.parametrize("block", [1, 3, 64])
def test_without_rows_errors_are_carried_along_each_row_alone(block: int) -> None:
    matrix, inputs = 3 * random(5, 8, seed=1), moment(8, 2)
    feedback = unit_upper(inputs).triu(1).neg()
    found = rounded_in_turn(matrix, levels((5, 8), 1.0), Feedback(feedback, None), before=matrix, block=block)
    alone = [nearest_plane(row[None], inputs, torch.ones(1, 1).double()) for row in matrix]
    assert torch.equal(found, torch.cat(alone))
    coupled = rounded_in_turn(
        matrix, levels((5, 8), 1.0), Feedback(feedback, torch.zeros(5, 5).double()), before=matrix, block=block
    )
    assert torch.equal(found, coupled)


def test_the_loss_is_the_sum_of_what_each_integer_leaves() -> None:
    """`N^T D M` is all that is left, and of each number at most half of its scale."""
    matrix, inputs, gradients, scale = random(6, 9, seed=1), moment(9, 2), moment(6, 3), 0.25
    left, right = unit_upper(gradients), unit_upper(inputs)
    feedback = Feedback(right.triu(1).neg(), left.triu(1))
    integers = rounded_in_turn(matrix, levels((6, 9), scale), feedback, before=matrix, block=4)
    residuals = left.T @ (integers * scale - matrix) @ right
    assert residuals.abs().max() <= scale / 2 + 1e-12


def test_integers_stay_in_their_range() -> None:
    matrix = 10 * random(6, 9, seed=1)
    found = rounded_in_turn(
        matrix,
        levels((6, 9), 1.0, largest=2),
        Feedback(unit_upper(moment(9, 2)).triu(1).neg(), unit_upper(moment(6, 3)).triu(1)),
        before=matrix,
        block=4,
    )
    assert found.abs().max() == 2


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_another_turn_changes_one_column_after_another(coupled: bool, block: int) -> None:
    """Each column is put where it is best beside the others as they are by then."""
    matrix, inputs, gradients = random(6, 9, seed=1), moment(9, 2), moment(6, 3) if coupled else torch.eye(6).double()
    scale = 0.5
    before = (matrix / scale).round() * scale
    own = inputs.diagonal()
    targets = before - (before - matrix) @ inputs / own
    feedback = Feedback((inputs / -own).triu(1), unit_upper(gradients).triu(1) if coupled else None)

    found = rounded_in_turn(targets, levels((6, 9), scale), feedback, before=before, block=block)

    expected = before.clone()
    for column in range(9):
        best = expected[:, column] - (expected - matrix) @ inputs[:, column] / own[column]
        one = torch.ones(1, 1).double()
        expected[:, column] = scale * nearest_plane(best[:, None] / scale, one, gradients)[:, 0]
    assert torch.equal(found * scale, expected)
