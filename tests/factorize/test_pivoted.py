"""A pivoted pair is its plain pair in fewer numbers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.factorize import FactorPair, decompose, pivoted_pair, truncated_svd
from compressor.factorize.pivoted import LARGEST_COEFFICIENT
from compressor.measure import Precision


@settings(max_examples=60)
@given(d_out=st.integers(1, 40), d_in=st.integers(1, 40), seed=st.integers(0, 2**31), data=st.data())
def test_it_is_lossless_with_coefficients_of_order_one(
    d_out: int, d_in: int, seed: int, *, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    torch.manual_seed(seed)
    plain = truncated_svd(torch.randn(d_out, d_in), rank)
    pivoted = pivoted_pair(plain)
    torch.testing.assert_close(pivoted.product(), plain.product(), rtol=1e-9, atol=1e-9)
    assert pivoted.up.shape == (d_out - rank, rank)
    assert sorted(pivoted.order.tolist()) == list(range(d_out))
    if pivoted.up.numel():
        assert float(pivoted.up.abs().max()) <= LARGEST_COEFFICIENT * (1 + 1e-9)


def test_it_agrees_to_1e_5_when_both_are_stored_in_float32() -> None:
    torch.manual_seed(0)
    for d_out, d_in, rank in ((300, 200, 90), (128, 512, 100), (256, 256, 255)):
        plain = truncated_svd(torch.randn(d_out, d_in), rank)
        pivoted = pivoted_pair(plain)
        stored = torch.cat([pivoted.down.float(), pivoted.up.float() @ pivoted.down.float()])[pivoted.order.long()]
        reference = plain.up.float() @ plain.down.float()
        assert float((stored - reference).norm() / reference.norm()) <= 1e-5


def test_a_truncated_svd_in_float32_is_pivoted_in_float32() -> None:
    torch.manual_seed(0)
    for d_out, d_in, rank in ((300, 200, 90), (128, 512, 100), (256, 256, 200)):
        matrix = torch.randn(d_out, d_in) * 10.0 ** -torch.linspace(0, 3, d_in)
        plain = decompose(matrix, None, Precision(loss=1, side=1)).pair(matrix, rank, None)
        pivoted = pivoted_pair(plain)
        assert pivoted.up.dtype == torch.float32
        assert float(pivoted.up.abs().max()) <= LARGEST_COEFFICIENT * (1 + 1e-6)
        assert float((pivoted.product() - plain.product()).norm() / plain.product().norm()) <= 1e-5


def test_its_first_rows_are_rows_of_the_matrix() -> None:
    torch.manual_seed(1)
    plain = truncated_svd(torch.randn(12, 9), 4)
    pivoted = pivoted_pair(plain)
    matrix = plain.product()
    chosen = (pivoted.order < 4).nonzero().flatten()
    rows = matrix[chosen[pivoted.order[chosen].long().argsort()]]
    torch.testing.assert_close(pivoted.down, rows, rtol=1e-12, atol=1e-12)


def test_swaps_reach_order_one_where_the_pivots_of_lu_do_not() -> None:
    # Wilkinson's matrix: the pivots of LU leave coefficients that grow as powers of two.
    size = 16
    growth = torch.eye(size, dtype=torch.float64) - torch.tril(torch.ones(size, size, dtype=torch.float64), -1)
    growth[:, -1] = 1
    up = torch.cat([growth, torch.ones(4, size, dtype=torch.float64).cumsum(1)])
    pivoted = pivoted_pair(FactorPair(up=up, down=torch.eye(size, dtype=torch.float64)))
    torch.testing.assert_close(pivoted.product(), up, rtol=1e-9, atol=1e-9)
    assert float(pivoted.up.abs().max()) <= LARGEST_COEFFICIENT * (1 + 1e-9)
