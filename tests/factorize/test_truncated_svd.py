"""Eckart and Young: no matrix of the rank is closer, and the error is the tail of the singular values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.factorize import truncated_svd

sides = st.integers(1, 24)


@settings(max_examples=60)
@given(d_out=sides, d_in=sides, seed=st.integers(0, 2**31), data=st.data())
def test_the_error_is_the_tail_of_the_singular_values(d_out: int, d_in: int, seed: int, *, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    torch.manual_seed(seed)
    matrix = torch.randn(d_out, d_in, dtype=torch.float64)
    pair = truncated_svd(matrix, rank)
    assert pair.up.shape == (d_out, rank)
    assert pair.down.shape == (rank, d_in)
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
    error = (matrix - pair.product()).norm()
    torch.testing.assert_close(error, tail, rtol=1e-9, atol=1e-12 * float(matrix.norm()))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factors_span_what_lapack_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rank = 12
    matrix = torch.randn(shape).to(dtype)
    pair = truncated_svd(matrix, rank)
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    for ours, theirs in ((pair.up, left[:, :rank]), (pair.down.T, right[:rank].T)):
        basis = torch.linalg.qr(ours).Q
        cosines = torch.linalg.svdvals(basis.T @ theirs)
        torch.testing.assert_close(cosines, torch.ones(rank, dtype=torch.float64), rtol=0, atol=1e-9)


def test_no_other_matrix_of_the_rank_is_closer() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(20, 15, dtype=torch.float64)
    best = truncated_svd(matrix, 4)
    error = (matrix - best.product()).norm()
    for _ in range(50):
        nudged_up = best.up + 0.05 * torch.randn_like(best.up)
        # Given one factor, least squares gives the best other one.
        nudged_down = torch.linalg.lstsq(nudged_up, matrix).solution
        assert (matrix - nudged_up @ nudged_down).norm() >= error


def test_a_rank_deficient_matrix_is_exact_at_its_rank_and_above() -> None:
    torch.manual_seed(2)
    matrix = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)
    for rank in (3, 4, 20):
        torch.testing.assert_close(truncated_svd(matrix, rank).product(), matrix, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="outside 1"):
        truncated_svd(torch.randn(5, 7), rank)
