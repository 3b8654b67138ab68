"""What calibration gathers at embeddings and tied heads, against autograd and against counting."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import compress
from compressor.calibration.criterion import sampled_loss
from compressor.data import open_data
from compressor.engine import Run
from compressor.factorize import Metric, TiedMetric, truncated_svd, weighted_truncated_svd
from compressor.io import open_checkpoint
from compressor.measure.moments import MomentPass, collect_moments
from compressor.measure.token_frequencies import EmbeddingCollector, EmbeddingMoments, smoothed_frequencies
from compressor.network import find_layers, module_architecture

TOKENS = 12


class Capped(nn.Module):
    """A tied language model of one layer whose logits are capped after the head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, TOKENS)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = 2 * torch.tanh(self.head(torch.tanh(self.mix(self.words(tokens)))) / 3)
        return result


def gathered(model: Any, passes: list[tuple[Tensor, Sequence[Tensor]]]) -> tuple[EmbeddingMoments, Any]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    collector = EmbeddingCollector({"words": (model.words, model.head)})
    generator = torch.Generator().manual_seed(0)

    def run(tokens: Tensor, masks: Sequence[Tensor]) -> None:
        logits = collector.watched(lambda: (model(tokens),), masks)()[0]
        sampled_loss(logits, masks, "likelihood", generator=generator).backward()  # type: ignore[no-untyped-call]

    with collector:
        watched = [MomentPass(lambda t=tokens, m=masks: run(t, m), masks) for tokens, masks in passes]  # type: ignore[misc]
        others = collect_moments({"mix": model.mix}, watched)
    found = collector.moments()["words"]
    assert found is not None
    assert not any(module._forward_hooks for module in model.modules())
    return found, others["mix"]


def passes_with_padding() -> list[tuple[Tensor, Sequence[Tensor]]]:
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    return [(torch.randint(0, 8, (3, 7)), (mask,)), (torch.randint(0, 8, (2, 7)), ())]


def test_counts_and_gradients_are_those_of_what_is_not_padding() -> None:
    torch.manual_seed(0)
    model = Capped()
    passes = passes_with_padding()
    found, mix = gathered(model, passes)
    kept = torch.cat([tokens[masks[0].bool()] if masks else tokens.flatten() for tokens, masks in passes])
    assert found.positions == len(kept) == 32
    assert found.uses == 1
    counts = torch.bincount(kept, minlength=TOKENS).double()
    torch.testing.assert_close(found.frequencies, (counts + 1) / (len(kept) + TOKENS))
    # The linear layer that reads the vectors passes its own gradients on to them.
    weight = model.mix.weight.double()
    torch.testing.assert_close(found.gradients, weight.T @ mix.gradients @ weight, rtol=1e-4, atol=1e-7)


def test_the_heads_moment_is_exact_over_all_targets_whatever_follows_the_head() -> None:
    torch.manual_seed(0)
    model = Capped()
    passes = passes_with_padding()
    found, _ = gathered(copy.deepcopy(model), passes)
    assert found.head is not None
    squares, hidden, positions = torch.zeros(TOKENS).double(), torch.zeros(5, 5).double(), 0
    for tokens, masks in passes:
        for vector in model.words(tokens[masks[0].bool()] if masks else tokens).reshape(-1, 5):
            h = torch.tanh(model.mix(vector)).detach()
            made = model.head(h).detach().requires_grad_(True)
            chances = (2 * torch.tanh(made / 3)).log_softmax(-1)
            for target in range(TOKENS):
                [gradient] = torch.autograd.grad(-chances[target], made, retain_graph=True)
                squares += (chances[target].exp() * gradient.square()).detach().double()
            hidden += torch.outer(h, h)
            positions += 1
    torch.testing.assert_close(found.head.hidden, hidden / positions, rtol=1e-5, atol=1e-8)
    # One more of every token was expected than these, at the mean slope: the same for all.
    added = found.head.logits * (positions + TOKENS) - squares
    torch.testing.assert_close(added, added.mean().expand(TOKENS), rtol=1e-4, atol=1e-5)
    assert float(added.mean()) > 0


def test_the_holdout_is_not_counted() -> None:
    from compressor.calibration import calibrate, split_examples

    model = Capped()
    torch.manual_seed(0)
    batches = [torch.full((1, 6), token) for token in range(8)]  # of which 3 and 7 are the holdout
    layers = find_layers(open_checkpoint(model), module_architecture(model), embeddings=True)
    run = Run(torch.device("cpu"))
    found = calibrate(model, layers, split_examples(open_data(batches)), run=run).metrics["words"]
    assert isinstance(found, TiedMetric)
    counts = 6 * torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0]).double()
    torch.testing.assert_close(found.lookup.inputs, (counts + 1) / (36 + TOKENS))


@settings(max_examples=100)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_smoothed_frequencies_keep_the_order_and_sum_to_one(counts: list[int]) -> None:
    found = smoothed_frequencies(torch.tensor(counts))
    assert float(found.sum()) == pytest.approx(1)
    assert float(found.min()) > 0
    assert torch.equal(found.argsort(stable=True), torch.tensor(counts).argsort(stable=True))


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(0, 2**31), st.integers(1, 5))
def test_absent_tokens_lose_no_more_than_truncation_without_data_would_lose_counted_as_the_data_do(
    seen: int, seed: int, rank: int
) -> None:
    """Against the plain truncated SVD, with E its errors: sum over absent |D|^2 <= sum over all (count + 1) |E|^2."""
    torch.manual_seed(seed)
    matrix = torch.randn(6, 30, dtype=torch.float64)
    counts = torch.bincount(torch.randint(0, 8, (seen,)), minlength=30)
    metric = Metric(smoothed_frequencies(counts), torch.eye(6, dtype=torch.float64))
    ours = (matrix - weighted_truncated_svd(matrix, rank, metric).product()).square().sum(0)
    plain = (matrix - truncated_svd(matrix, rank).product()).square().sum(0)
    assert float(ours[counts == 0].sum()) <= float(((counts + 1) * plain).sum()) * (1 + 1e-9)


class Bigrams(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 24)
        self.mix = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 60)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.mix(self.words(tokens)))
        return result


def sequences(count: int, seed: int) -> Tensor:
    """Walks of a fixed random chain on 60 states, few of which are frequent."""
    torch.manual_seed(5)
    popularity = torch.arange(1, 61).float().pow(-1)
    chain = (torch.randn(60, 60) * 1.5 + popularity.log()).softmax(-1)
    torch.manual_seed(seed)
    steps = [torch.multinomial(popularity, count, replacement=True)]
    for _ in range(31):
        steps.append(torch.multinomial(chain[steps[-1]], 1).squeeze(1))
    return torch.stack(steps, 1)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_calibration_makes_a_pair_that_loses_less_and_says_what_it_loses(tied: bool) -> None:
    torch.manual_seed(0)
    model = Bigrams(tied)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for walks in sequences(16 * 150, 0).split(16):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(walks[:, :-1]).flatten(0, 1), walks[:, 1:].flatten()).backward()
        optimizer.step()
    model.eval()
    data = list(sequences(128, 1).split(8))
    test = sequences(128, 2)

    @torch.no_grad()
    def divergence(other: nn.Module | None) -> float:
        assert other is not None
        before, after = (each(test).double().log_softmax(-1).flatten(0, 1) for each in (model, other))
        return float(nn.functional.kl_div(after, before, log_target=True, reduction="batchmean"))

    options: Any = {"include": ["words"], "embeddings": True, "keep": 0.8}
    plain = compress(model, prefer="size", **options)
    calibrated = compress(model, prefer="size", bits=16, **options, calibration=data)
    assert [layer.rank for layer in calibrated.plan.layers] == [layer.rank for layer in plain.plan.layers]
    assert divergence(calibrated.model) < divergence(plain.model) / 2
    result = calibrated.plan.calibration
    assert result is not None
    assert 1 / 3 < result.predicted_loss / result.holdout_loss < 3
