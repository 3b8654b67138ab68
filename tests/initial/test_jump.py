"""Jumps over numbers of the generator."""

from __future__ import annotations

import pytest
import torch

from compressor.initial.jump import Jump


def drawn(words: int, seed: int) -> torch.Tensor:
    """The state of the generator after so many words were drawn."""
    generator = torch.Generator().manual_seed(seed)
    torch.rand(words, generator=generator)
    return generator.get_state()


@pytest.mark.parametrize("words", [1, 623, 624, 625, 19_937, 19_938, 100_003, 1_234_567])
def test_a_jump_leads_where_drawing_does(words: int) -> None:
    assert Jump(words).holds(drawn(words, 17), 17)
    assert not Jump(words).holds(drawn(words + 1, 17), 17)


def test_many_seeds_jump_at_once() -> None:
    seeds = (0, 3, 2**32 - 1, 2**63)
    for seed, state in zip(seeds, Jump(5000).states(seeds), strict=True):
        one, other = torch.Generator().set_state(state), torch.Generator().set_state(drawn(5000, seed))
        assert torch.equal(torch.randn(2000, generator=one), torch.randn(2000, generator=other))
