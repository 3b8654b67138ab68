"""Effective ranks against their definitions, and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.measure import (
    effective_ranks,
    energy_rank,
    entropy_rank,
    frobenius_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
    truncation_errors,
)

spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30).map(lambda values: np.sort(np.array(values))[::-1])


@given(st.integers(1, 40), st.floats(1e-3, 1e3))
def test_equal_singular_values_have_every_effective_rank_equal_to_their_number(count: int, value: float) -> None:
    s = np.full(count, value)
    ranks = effective_ranks(s)
    assert ranks.numerical == ranks.full == count
    for smooth in (ranks.entropy, ranks.participation_ratio, ranks.stable):
        assert smooth == pytest.approx(count, rel=1e-9)


@given(spectra, st.floats(1e-3, 1e3))
def test_effective_ranks_do_not_change_under_scaling(s: np.ndarray, factor: float) -> None:
    a, b = effective_ranks(s), effective_ranks(s * factor)
    assert (a.full, a.frobenius, a.energy) == (b.full, b.frobenius, b.energy)
    assert a.entropy == pytest.approx(b.entropy, rel=1e-9)
    assert a.participation_ratio == pytest.approx(b.participation_ratio, rel=1e-9)
    assert a.stable == pytest.approx(b.stable, rel=1e-9)


@given(spectra)
def test_the_smooth_ranks_are_ordered_and_bounded(s: np.ndarray) -> None:
    assert 1 - 1e-9 <= stable_rank(s) <= participation_ratio(s) * (1 + 1e-9)
    assert participation_ratio(s) <= len(s) * (1 + 1e-9)
    assert entropy_rank(s) <= len(s) * (1 + 1e-9)


@given(spectra, st.floats(0.01, 0.9))
def test_the_frobenius_rank_is_the_smallest_that_meets_its_error(s: np.ndarray, epsilon: float) -> None:
    k = frobenius_rank(s, epsilon)

    def error(rank: int) -> float:
        return float(np.linalg.norm(s[rank:]) / np.linalg.norm(s))

    assert error(k) <= epsilon * (1 + 1e-12)
    assert k == 0 or error(k - 1) > epsilon * (1 - 1e-12)


@given(spectra, st.floats(0.1, 0.999))
def test_the_energy_rank_is_the_smallest_that_holds_its_share(s: np.ndarray, share: float) -> None:
    k = energy_rank(s, share)
    energy = np.square(s) / np.square(s).sum()
    assert energy[:k].sum() >= share - 1e-9
    assert energy[: k - 1].sum() < share + 1e-9


def test_the_numerical_rank_counts_relative_to_the_largest() -> None:
    assert numerical_rank(np.array([10.0, 1.0, 0.02, 0.009]), 1e-3) == 3


def test_a_zero_matrix_has_rank_zero_by_every_count() -> None:
    ranks = effective_ranks(np.zeros(4))
    assert (ranks.numerical, ranks.frobenius, ranks.energy) == (0, 0, 0)
    assert (ranks.entropy, ranks.participation_ratio, ranks.stable) == (0.0, 0.0, 0.0)


def test_truncation_errors_start_at_one_and_end_at_zero() -> None:
    errors = truncation_errors(np.array([4.0, 3.0]))
    assert errors.tolist() == pytest.approx([1.0, 0.6, 0.0])
