"""Singular values from the smaller Gram matrix, against LAPACK in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.measure import Precision, singular_basis, singular_values
from compressor.measure.spectrum import smaller_gram


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (40, 40), (64, 20), (20, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_singular_values_agree_with_lapack(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape).to(dtype)
    exact = torch.linalg.svdvals(matrix.double()).numpy()
    np.testing.assert_allclose(singular_values(matrix), exact, rtol=1e-9, atol=2e-8 * exact[0])


def test_singular_values_below_the_accuracy_of_the_gram_matrix_are_zero_not_wrong() -> None:
    torch.manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q for _ in range(2))
    exact = torch.logspace(0, -14, 30, dtype=torch.float64)
    measured = singular_values(left @ torch.diag(exact) @ right.T)
    np.testing.assert_allclose(measured, exact.numpy(), rtol=1e-3, atol=1e-7)
    assert not measured[exact.numpy() < 1e-9].any()


@pytest.mark.parametrize("factor", [1e-170, 1e-30, 1e160])
def test_extreme_scales_neither_vanish_nor_overflow(factor: float) -> None:
    torch.manual_seed(5)
    matrix = torch.randn(20, 30, dtype=torch.float64)
    np.testing.assert_allclose(singular_values(matrix * factor), singular_values(matrix) * factor, rtol=1e-9)


def test_rank_deficient_and_zero_matrices_have_the_rank_they_have() -> None:
    torch.manual_seed(3)
    product = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 40, dtype=torch.float64)
    values = singular_values(product)
    assert int((values > 0).sum()) == 3
    assert singular_values(torch.zeros(4, 3)).tolist() == [0.0, 0.0, 0.0]


def test_the_gram_matrix_is_the_same_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    matrix = torch.randn(100, 3000)
    whole = matrix.double() @ matrix.double().T
    torch.testing.assert_close(smaller_gram(matrix), whole, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(smaller_gram(matrix.T), whole, rtol=1e-12, atol=1e-10)


@settings(max_examples=80)
@given(
    shape=st.tuples(st.integers(2, 60), st.integers(2, 60)),
    decay=st.floats(0, 4),
    rank=st.integers(1, 60),
    size=st.integers(-18, 18),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_one_decomposition_captures_at_every_rank_what_lapack_in_float64_does(
    shape: tuple[int, int], decay: float, rank: int, *, size: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    least = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, least, dtype=torch.float64)).Q for side in shape)
    values = torch.arange(1, least + 1, dtype=torch.float64) ** -decay
    values[rank:] = 0
    matrix = (10.0**size * (left * values) @ right.T).to(dtype)
    found = singular_basis(matrix, Precision(side=2))
    exact = torch.linalg.svdvals(matrix.double())
    rows = matrix.double() if shape[0] <= shape[1] else matrix.double().T
    captured = (torch.linalg.qr(found.vectors.double()).Q.T @ rows).square().sum(1).cumsum(0)
    best = exact.square().cumsum(0)
    assert ((best - captured) <= 1e-6 * best).all()
    assert found.values.shape == (least,)
    assert (np.diff(found.values) <= 0).all()
    # Every tail is known to the share that may be lost.
    sums = np.cumsum(np.square(found.values))
    np.testing.assert_allclose(sums, best.numpy(), rtol=3e-6)


def test_float32_is_used_where_it_loses_nothing_and_float64_where_it_might() -> None:
    torch.manual_seed(6)
    flat = torch.randn(80, 120)
    deficient = flat.T[:, :40] @ flat[:40]
    precision = Precision(side=80)
    for matrix in (flat, flat.T, flat.bfloat16()):
        assert singular_basis(matrix, precision).vectors.dtype == torch.float32
    for matrix in (deficient, flat.double(), torch.zeros(80, 80), flat[:79]):
        assert singular_basis(matrix, precision).vectors.dtype == torch.float64
    assert singular_basis(flat, replace(precision, loss=1e-12)).vectors.dtype == torch.float64
