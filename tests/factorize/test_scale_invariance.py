"""Numbers do not depend on the unit of a matrix: times a power of two all of them change by it, in every digit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import compress
from compressor.factorize import (
    Metric,
    TiedMetric,
    decompose,
    decompose_tied,
    pivoted_pair,
    spatial_errors,
    spatial_pair,
    tied_truncated_svd,
    truncated_svd,
    weighted_truncated_svd,
)
from compressor.measure import effective_ranks, singular_values, truncation_errors
from compressor.merging.overlap import layer_overlap

# From weights whose squares vanish in float64 to weights whose squares overflow.
EXPONENTS = st.integers(-900, 900)


def matrix(d_out: int, d_in: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(d_out, d_in, dtype=torch.float64) * torch.logspace(0, -2, d_in, dtype=torch.float64)


def moment(size: int, seed: int) -> Tensor:
    spread = matrix(size, 2 * size, seed)
    return spread @ spread.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


@hypothesis_settings(max_examples=30)
@given(
    d_out=st.integers(2, 16), d_in=st.integers(2, 16), exponent=EXPONENTS, seed=st.integers(0, 2**20), data=st.data()
)
def test_spectra_and_factors_scale_with_their_matrix(
    d_out: int, d_in: int, exponent: int, *, seed: int, data: st.DataObject
) -> None:
    rank, factor = data.draw(st.integers(1, min(d_out, d_in))), 2.0**exponent
    w = matrix(d_out, d_in, seed)
    spectrum = singular_values(w)
    np.testing.assert_array_equal(singular_values(factor * w), factor * spectrum)
    np.testing.assert_array_equal(truncation_errors(factor * spectrum), truncation_errors(spectrum))
    assert effective_ranks(factor * spectrum) == effective_ranks(spectrum)
    metric = Metric(moment(d_in, seed + 1), moment(d_out, seed + 2))
    weighted = decompose(w, metric).values
    np.testing.assert_array_equal(decompose(factor * w, metric).values, factor * weighted)
    for pair, scaled in (
        (truncated_svd(w, rank), truncated_svd(factor * w, rank)),
        (weighted_truncated_svd(w, rank, metric), weighted_truncated_svd(factor * w, rank, metric)),
    ):
        torch.testing.assert_close(scaled.product() / factor, pair.product(), rtol=1e-12, atol=1e-13)
        pivoted, scaled_pivoted = pivoted_pair(pair), pivoted_pair(scaled)
        assert torch.equal(scaled_pivoted.order, pivoted.order)
        torch.testing.assert_close(scaled_pivoted.product() / factor, pair.product(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("exponent", [-900, -500, 500, 900])
def test_spatial_and_tied_pairs_scale_with_their_matrix(exponent: int) -> None:
    factor = 2.0**exponent
    kernel = matrix(6, 5 * 9, 0).reshape(6, 5, 3, 3)
    metric = Metric(moment(45, 1), moment(6, 2))
    np.testing.assert_array_equal(spatial_errors(factor * kernel, metric), spatial_errors(kernel, metric))
    for known in (None, metric):
        expected = spatial_pair(kernel, 4, known).product()
        found = spatial_pair(factor * kernel, 4, known).product() / factor
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    words = matrix(6, 20, 3)
    tied = TiedMetric(
        *(Metric(torch.rand(20, dtype=torch.float64) + 0.1, moment(6, seed)) for seed in (4, 5)),
    )
    np.testing.assert_array_equal(
        decompose_tied(factor * words, tied).values, factor * decompose_tied(words, tied).values
    )
    expected = tied_truncated_svd(words, 3, tied).product()
    torch.testing.assert_close(tied_truncated_svd(factor * words, 3, tied).product() / factor, expected)


@pytest.mark.parametrize("factor", [1e-200, 1e160, 1e300])
def test_errors_of_extreme_weights_are_those_that_lapack_gives(factor: float) -> None:
    w = matrix(12, 20, 0)
    exact = torch.linalg.svdvals(w)
    tails = exact.square().flip(0).cumsum(0).flip(0)
    errors = (tails / tails[0]).sqrt().numpy()
    np.testing.assert_allclose(truncation_errors(singular_values(factor * w))[:-1], errors, rtol=1e-6)


def test_the_interference_of_networks_does_not_depend_on_their_scale() -> None:
    pair = [matrix(8, 12, seed) for seed in (0, 1)]
    plain = layer_overlap("layer", pair, None).interference
    assert plain is not None
    assert plain[0] > 0
    for exponent in (-700, 500):
        assert layer_overlap("layer", [2.0**exponent * each for each in pair], None).interference == plain


@pytest.mark.parametrize("factor", [2.0**-664, 2.0**520])
def test_a_network_of_extreme_weights_gets_the_ranks_and_errors_of_the_same_network_in_another_unit(
    factor: float,
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16)).double()
    plans = []
    for scale in (1.0, factor):
        scaled = nn.Sequential(*(nn.Linear(m.in_features, m.out_features).double() for m in network[::2]))
        for ours, theirs in zip(scaled, network[::2], strict=True):
            ours.weight.data = scale * theirs.weight.data
        for request in ({"keep": 0.5}, {"tolerance": 0.6}):
            plans.append(
                [
                    (layer.rank, layer.form, layer.error)
                    for layer in compress(scaled, prefer="size", **request).plan.layers
                ]
            )
    assert any(rank is not None for rank, _, _ in plans[0])
    for expected, found in zip(plans[:2], plans[2:], strict=True):
        assert [each[:2] for each in found] == [each[:2] for each in expected]
        np.testing.assert_allclose([each[2] for each in found], [each[2] for each in expected], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [-120, -80, 80, 120])
def test_calibrated_ranks_do_not_depend_on_the_unit_of_the_inputs(exponent: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 48, bias=False), nn.Linear(48, 24, bias=False)).double()
    inputs = torch.randn(4, 16, 24, dtype=torch.float64)
    found = [
        compress(network, keep=0.5, calibration=list(scale * inputs), effort="balanced", prefer="size", bits=16).plan
        for scale in (1, 2.0**exponent)
    ]
    ranks, losses = zip(*(([layer.rank for layer in plan.layers], plan.calibration) for plan in found), strict=True)
    assert ranks[0] == ranks[1]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[1].predicted_loss == pytest.approx(4.0**exponent * losses[0].predicted_loss, rel=1e-6)
    assert losses[1].holdout_loss == pytest.approx(4.0**exponent * losses[0].holdout_loss, rel=1e-6)
