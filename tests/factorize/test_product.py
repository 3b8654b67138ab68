"""The SVD of a product from its factors, against that of the product by LAPACK."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.factorize import FactorPair, product_difference, product_norm, product_svd


def pair(d_out: int, rank: int, d_in: int, *, scale: float = 1.0) -> FactorPair:
    generator = torch.Generator().manual_seed(1000 * d_out + 10 * rank + d_in)
    up = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return FactorPair(up=scale * up, down=scale * torch.randn(rank, d_in, generator=generator, dtype=torch.float64))


@given(st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 12)), st.data())
def test_it_is_that_of_the_product(sides: tuple[int, int, int], data: st.DataObject) -> None:
    d_out, rank, d_in = sides
    given_pair = pair(d_out, rank, d_in)
    left, values, right = np.linalg.svd(given_pair.product().numpy(), full_matrices=False)
    found = product_svd(given_pair)
    most = min(d_out, rank, d_in)
    assert len(found.spectrum) == most
    np.testing.assert_allclose(found.spectrum, values[:most], rtol=1e-10, atol=1e-12 * values[0])
    cut = data.draw(st.integers(1, most))
    best = left[:, :cut] * values[:cut] @ right[:cut]
    np.testing.assert_allclose(found.pair(cut).product().numpy(), best, atol=1e-9 * values[0])


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_sizes_beyond_what_squares_hold(scale: float) -> None:
    given_pair, one = pair(7, 3, 5, scale=scale), pair(7, 3, 5)
    np.testing.assert_allclose(product_svd(given_pair).spectrum, scale**2 * product_svd(one).spectrum, rtol=1e-12)


def test_norms_and_differences_are_those_of_the_products() -> None:
    first, second = pair(9, 4, 6), pair(9, 2, 6)
    difference = product_difference(first, second)
    torch.testing.assert_close(difference.product(), first.product() - second.product())
    assert product_norm(difference) == pytest.approx(float(torch.linalg.matrix_norm(difference.product())), rel=1e-12)


def test_a_rank_that_the_product_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 4 is outside 1 .. 3"):
        product_svd(pair(9, 3, 6)).pair(4)


@pytest.mark.parametrize("scale", [1e-120, 1.0, 1e120])
def test_factors_share_its_size_evenly_however_unbalanced_those_of_the_product_are(scale: float) -> None:
    torch.manual_seed(0)
    up, down = torch.randn(40, 12, dtype=torch.float64), torch.randn(12, 30, dtype=torch.float64)
    up[:, 6:] = up[:, :6]  # of rank 6
    weights = torch.logspace(0, -9, 12, dtype=torch.float64)
    exact = up @ down
    found = product_svd(FactorPair(scale * up * weights, down / weights[:, None]))
    for rank in (6, 9, 12):
        even = found.even_pair(rank)
        assert float((even.product() / scale - exact).norm()) <= 1e-6 * float(exact.norm())
        sizes = even.up.norm(dim=0), even.down.norm(dim=1)
        torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-9, atol=0)
