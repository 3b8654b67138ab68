"""Gradients on sampled targets have the curvature of the loss as their second moment, however sure the model is."""

from __future__ import annotations

import pytest
import torch

from compressor.calibration.criterion import _drawn_targets, _squared_lengths

NEVER = -float("inf")
LOGITS = ([2.0, 1.0, 0.0, -1.0, -3.0], [30.0, 1.0, 0.0, -1.0, -3.0], [NEVER, 30.0, NEVER, 9.0, 10.0, NEVER])


@pytest.mark.parametrize("logits", LOGITS)
def test_the_second_moment_of_gradients_is_the_fisher_information(logits: list[float]) -> None:
    rows = torch.tensor(logits).expand(200_000, -1)
    targets, weights = _drawn_targets(rows, torch.Generator().manual_seed(0))
    p = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    size = len(p)
    gradients = torch.eye(size, dtype=torch.float64) - p
    mass = torch.bincount(targets, weights.double().square(), minlength=size) / len(rows)
    found, fisher = (gradients.T * mass) @ gradients, torch.diag(p) - torch.outer(p, p)
    assert float((found - fisher).norm()) <= 0.01 * float(fisher.norm())
    assert not mass[p == 0].any()
    # The squared length of every gradient is the trace of the Fisher information, and the mean is zero.
    lengths = weights.double().square() * gradients.square().sum(1)[targets]
    torch.testing.assert_close(lengths, torch.full_like(lengths, float(fisher.trace())), rtol=1e-5, atol=0)
    assert abs(float(weights.double().sign().mean())) < 0.01


@pytest.mark.parametrize("logits", LOGITS)
def test_squared_lengths_have_all_digits_of_float32(logits: list[float]) -> None:
    p = torch.tensor([logits]).softmax(-1)
    exact = torch.eye(p.shape[-1], dtype=torch.float64) - torch.tensor(logits, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(_squared_lengths(p)[0].double(), exact.square().sum(1), rtol=1e-5, atol=0)


def test_of_a_large_vocabulary_classes_are_drawn_in_proportion() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(20_000)
    p = logits.double().softmax(-1)
    chances = p * (1 - 2 * p + p.square().sum())
    chances /= chances.sum()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([_drawn_targets(logits.expand(256, -1), generator)[0] for _ in range(12)])
    for part in torch.tensor_split(chances.argsort(descending=True), [10, 100, 1000, 10_000]):
        expected = float(chances[part].sum())
        share = float(torch.isin(drawn, part).double().mean())
        assert abs(share - expected) <= 4 * (expected * (1 - expected) / len(drawn)) ** 0.5
