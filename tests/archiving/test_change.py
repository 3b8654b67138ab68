"""A tensor is restored to within the tolerance from a change, which takes few bytes where the change is simple."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compressor.archiving.change import Change, Reference, change_from

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(change: Change, tensor: Tensor, reference: Reference) -> float:
    restored = change.restored(tensor, reference.tensor)
    assert (restored.dtype, restored.shape) == (tensor.dtype, tensor.shape)
    wide = tensor.double()
    return float((restored.double() - wide).norm()) / max(float(wide.norm()), 1e-300)


@given(
    shape=st.lists(st.integers(0, 12), max_size=3).map(tuple),
    dtype=st.sampled_from(FLOATS),
    tolerance=st.sampled_from((0.0, 1e-9, 1e-6, 1e-3, 0.05, 0.5)),
    size=st.sampled_from((0.0, 1e-5, 1e-2, 1.0, 100.0)),
    seed=st.integers(0, 5),
)
def test_the_error_is_at_most_the_tolerance(
    shape: tuple[int, ...], dtype: torch.dtype, *, tolerance: float, size: float, seed: int
) -> None:
    before = normal(*shape, seed=seed).to(dtype)
    tensor = (before.double() + size * normal(*shape, seed=seed + 1)).to(dtype)
    for reference in (Reference(), Reference("previous", before, 0.9), Reference("initial", before, 1.0)):
        change = change_from(tensor, reference, tolerance)
        assert error_of(change, tensor, reference) <= tolerance
        assert change.source == reference.source


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_without_a_tolerance_every_bit_comes_back(dtype: torch.dtype) -> None:
    before, tensor = (torch.randint(0, 2, (5, 7), generator=torch.manual_seed(each)).to(dtype) for each in (0, 1))
    for reference in (Reference(), Reference("previous", before, 1.0)):
        change = change_from(tensor, reference, 0.0)
        again = change.restored(tensor, reference.tensor)
        assert again.dtype == dtype
        assert torch.equal(again.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_what_is_not_finite_comes_back_bit_for_bit() -> None:
    tensor = torch.tensor([[math.nan, math.inf], [-math.inf, -0.0]])
    reference = Reference("previous", torch.ones(2, 2), 1.0)
    again = change_from(tensor, reference, 0.1).restored(tensor, reference.tensor)
    assert torch.equal(again.view(torch.int32), tensor.view(torch.int32))


def test_nothing_is_stored_of_what_is_left_of_the_earlier_tensor() -> None:
    before = normal(40, 30)
    change = change_from(0.9 * before, Reference("previous", before, 0.9), 1e-3)
    assert (change.payload, change.rank, change.step) == (b"", 0, 0.0)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_a_change_of_low_rank_is_a_pair_of_this_rank(tolerance: float) -> None:
    before, size = normal(200, 150), 0.05
    tensor = before + size * normal(200, 3, seed=1) @ normal(3, 150, seed=2)
    change = change_from(tensor, Reference("previous", before, 1.0), tolerance)
    assert (change.rank, change.step) == (3, 0.0)
    # An ideal code of 3 x 350 normal numbers to this error, and an eighth and the singular values beside it.
    share = size * math.sqrt(3) / math.sqrt(1 + 3 * size**2)
    bits = 3 * 350 * math.log2(share * math.sqrt(350) / tolerance / math.sqrt(150))
    assert 8 * len(change.payload) <= 1.25 * bits + 3 * 32 + 3 * 350


def test_a_change_without_structure_is_rounded_to_as_many_bits_as_the_tolerance_needs() -> None:
    before, size, tolerance = normal(200, 150), 0.05, 1e-3
    change = change_from(before + size * normal(200, 150, seed=1), Reference("previous", before, 1.0), tolerance)
    assert (change.rank, change.exact) == (0, False)
    # The rate of a uniform quantizer with an entropy code: a quarter of a bit above the rate-distortion function.
    bits = 200 * 150 * (math.log2(size / tolerance) + 0.254)
    assert bits * 0.99 <= 8 * len(change.payload) <= 1.05 * bits


def test_spikes_in_noise_are_a_pair_and_a_rounded_remainder() -> None:
    before = normal(100, 100)
    tensor = before + 0.02 * normal(100, 100, seed=1) + normal(100, 2, seed=2) @ normal(2, 100, seed=3)
    reference = Reference("previous", before, 1.0)
    change = change_from(tensor, reference, 1e-3)
    assert change.rank == 2
    assert change.step > 0
    alone = change_from(tensor - normal(100, 2, seed=2) @ normal(2, 100, seed=3), reference, 1e-3)
    assert len(change.payload) < len(alone.payload) + 1000


def test_a_bound_on_the_rank_is_kept() -> None:
    before = normal(60, 50)
    tensor = before + normal(60, 4, seed=1) @ normal(4, 50, seed=2)
    change = change_from(tensor, Reference("previous", before, 1.0, rank_bound=4), 1e-5)
    assert 0 < change.rank <= 4


def test_what_takes_no_fewer_bytes_to_within_an_error_is_kept_bit_for_bit() -> None:
    few_bits = normal(60, 50).bfloat16().float()  # to 1e-6 they would need 21 bits instead of 16
    assert change_from(few_bits, Reference(), 1e-6).exact
    assert not change_from(few_bits, Reference(), 1e-3).exact


@pytest.mark.parametrize(
    "damaged",
    [
        {"payload": b"no deflated bytes"},
        {"payload": b""},
        {"rank": 100},
        {"rank": 2},
        {"widths": (4, 1, 1)},
    ],
)
def test_what_is_damaged_is_refused(damaged: dict[str, object]) -> None:
    before = normal(30, 20)
    tensor = before + normal(30, 3, seed=1) @ normal(3, 20, seed=2)
    good = change_from(tensor, Reference("previous", before, 1.0), 1e-3)
    bad = Change(**{name: getattr(good, name) for name in good.__dataclass_fields__} | damaged)
    with pytest.raises(ValueError, match=r"."):
        bad.restored(tensor, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "another"},
        {"share": math.nan},
        {"rank": -1},
        {"rank": 1.5},
        {"widths": (3, 1, 1)},
        {"step": math.inf},
        {"exact": 1},
    ],
)
def test_a_change_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Change(**{"source": "previous", "share": 1.0} | wrong)
