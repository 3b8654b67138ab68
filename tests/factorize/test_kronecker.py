"""The SVD of a Kronecker product from its factors, against that of the product by LAPACK."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.factorize import FactorPair, KroneckerProduct

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6))


def pair(shape: tuple[int, int, int], seed: int) -> FactorPair:
    generator = torch.Generator().manual_seed(seed)
    (d_out, _, d_in), rank = shape, min(shape)
    up = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return FactorPair(up, torch.randn(d_in, rank, generator=generator, dtype=torch.float64).T)


@given(SHAPES, SHAPES, st.data())
def test_it_is_that_of_the_product(
    first: tuple[int, int, int], second: tuple[int, int, int], data: st.DataObject
) -> None:
    product = KroneckerProduct(pair(first, 1), pair(second, 2))
    full = np.kron(product.first.product().numpy(), product.second.product().numpy())
    left, values, right = np.linalg.svd(full, full_matrices=False)
    svd, most = product.svd(), product.rank
    np.testing.assert_allclose(product.norm, np.linalg.norm(full), rtol=1e-12)
    np.testing.assert_allclose(product.pair().product().numpy(), full, atol=1e-12 * values[0])
    assert svd.spectrum.shape == (most,)
    np.testing.assert_allclose(svd.spectrum, values[:most], rtol=1e-9, atol=1e-12 * values[0])
    cut = data.draw(st.integers(1, most))
    found, best = svd.even_pair(cut), left[:, :cut] * values[:cut] @ right[:cut]
    assert (found.up.shape, found.down.shape) == ((len(full), cut), (cut, full.shape[1]))
    if cut == most or values[cut] < (1 - 1e-6) * values[cut - 1]:  # of equal ones either may be kept
        np.testing.assert_allclose(found.product().numpy(), best, atol=1e-8 * values[0])
    np.testing.assert_allclose(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-9)
