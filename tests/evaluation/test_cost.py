"""Costs against formulas worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.errors import BadInput
from compressor.evaluation import (
    TimingSettings,
    count_bytes,
    count_macs,
    count_parameters,
    measure_latency,
    measure_peak_memory,
    process_memory,
    resident_memory,
)
from compressor.lowrank import low_rank_layer
from compressor.model import resolve_device


def macs(model: nn.Module, *shape: int) -> int:
    return count_macs(model, {"inputs": torch.zeros(*shape)}, device="cpu")


def llama_macs(config, length: int) -> int:
    d, f = config.hidden_size, config.intermediate_size
    kv = d * config.num_key_value_heads // config.num_attention_heads
    projections = length * (2 * d * d + 2 * d * kv + 3 * d * f)
    scores_and_values = 2 * length * length * d
    return config.num_hidden_layers * (projections + scores_and_values) + length * d * config.vocab_size


@settings(max_examples=15)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), st.integers(1, 7))
def test_macs_of_an_mlp_are_its_matrices_times_the_batch(widths, batch):
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    expected = batch * sum(a * b for a, b in itertools.pairwise(widths))
    assert macs(nn.Sequential(*layers), batch, widths[0]) == expected


@settings(max_examples=15)
@given(
    dimensions=st.integers(1, 3),
    groups=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    kernel=st.integers(1, 3),
    size=st.integers(5, 8),
)
def test_macs_of_a_convolution(*, dimensions, groups, stride, padding, kernel, size):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    layer = kind(2 * groups, 4 * groups, kernel, stride=stride, padding=padding, groups=groups)
    positions = ((size + 2 * padding - kernel) // stride + 1) ** dimensions
    assert macs(layer, 2, 2 * groups, *[size] * dimensions) == 2 * positions * 4 * groups * 2 * kernel**dimensions


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_macs_of_a_llama_with_grouped_query_attention(llama, attention):
    """The fused attention kernel of the CPU counts as the two products that it makes."""
    llama.set_attn_implementation(attention)
    ids = torch.zeros(1, 10, dtype=torch.int64)
    assert count_macs(llama, {"input_ids": ids}, device="cpu") == llama_macs(llama.config, 10)


def test_macs_of_gpt2_whose_linear_layers_are_conv1d():
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    expected = 2 * (10 * 12 * 16 * 16 + 2 * 10 * 10 * 16) + 10 * 16 * 20
    ids = torch.zeros(1, 10, dtype=torch.int64)
    assert count_macs(GPT2LMHeadModel(config), {"input_ids": ids}, device="cpu") == expected


def test_macs_of_layers_with_fused_kernels():
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    assert macs(encoder, 1, 8, 16) == 8 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 8 * 8 * 16

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    assert macs(Recurrent(), 5, 1, 3) == 5 * 4 * (3 * 8 + 8 * 8)


def test_macs_of_a_matrix_vector_product():
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    assert macs(Scores(), 5, 7) == 35


def test_counting_macs_leaves_the_backends_as_they_were():
    before = (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )
    macs(nn.Linear(2, 3), 1, 2)
    assert before == (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )


@settings(max_examples=15)
@given(d_in=st.integers(1, 12), d_out=st.integers(1, 12), rank=st.integers(1, 12), batch=st.integers(1, 5))
def test_a_pair_costs_r_times_the_sum_of_its_sides(d_in, d_out, rank, *, batch):
    pair = nn.Sequential(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False))
    assert macs(pair, batch, d_in) == batch * rank * (d_in + d_out)
    assert count_parameters(pair) == rank * (d_in + d_out)


@pytest.mark.parametrize(("form", "saved", "order"), [("plain", 0, 0), ("pivoted", 5, 12)])
def test_low_rank_layers_cost_what_their_matrices_do(form, saved, order):
    """A pivoted pair of rank r saves r rows of r coefficients, and stores the order of its rows."""
    layer = low_rank_layer(nn.Linear(20, 12, bias=False), form, 5)
    if order:
        layer.order.copy_(torch.arange(12))
    numbers = 5 * (20 + 12 - saved)
    assert macs(layer, 3, 20) == 3 * numbers
    assert count_parameters(layer) == numbers + order


def test_parameters_are_all_stored_numbers_with_tied_ones_once(llama):
    class Reordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 5)
            self.again = self.linear
            self.register_buffer("order", torch.arange(5, dtype=torch.int32))
            self.register_buffer("weight", torch.empty(0))
            self.register_buffer("recomputed", torch.zeros(100), persistent=False)

    assert count_parameters(Reordered()) == 3 * 5 + 5 + 5
    assert count_bytes(Reordered()) == 4 * (3 * 5 + 5 + 5)
    assert count_bytes(Reordered().to(torch.bfloat16)) == 2 * (3 * 5 + 5) + 4 * 5

    untied = count_parameters(llama)
    llama.config.tie_word_embeddings = True
    llama.tie_weights()
    assert count_parameters(llama) == untied - 12 * 16
    batch_norm = nn.BatchNorm1d(4)
    assert count_parameters(batch_norm) == 4 * 4 + 1, "running statistics are stored"


def test_peak_memory_is_what_is_alive_at_the_worst_moment():
    """Two linear layers one after the other: input, hidden and output are alive together, nothing else is."""
    model = nn.Sequential(nn.Linear(10, 100, bias=False), nn.Linear(100, 20, bias=False))
    weights, inputs, hidden, output = 10 * 100 + 100 * 20, 8 * 10, 8 * 100, 8 * 20
    peak = measure_peak_memory(model, {"inputs": torch.zeros(8, 10)}, device="cpu")
    assert peak == 4 * (weights + inputs + hidden + output)


def test_peak_memory_forgets_what_was_freed():
    """A chain of equal layers needs two activations at a time, however long it is."""
    for depth in (2, 3, 10):
        model = nn.Sequential(*[nn.Linear(50, 50, bias=False) for _ in range(depth)])
        peak = measure_peak_memory(model, {"inputs": torch.zeros(4, 50)}, device="cpu")
        assert peak == 4 * (depth * 50 * 50 + 4 * 50 + 2 * 4 * 50)


def test_views_and_operations_in_place_take_no_memory():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False), nn.ReLU(inplace=True))
    peak = measure_peak_memory(model, {"inputs": torch.zeros(2, 3, 4)}, device="cpu")
    assert peak == 4 * (12 * 6 + 2 * 12 + 2 * 6)


def test_latency_of_a_model_against_itself():
    model = nn.Linear(8, 8).train()
    latency = measure_latency(model, {"inputs": torch.zeros(5, 8)}, baseline=model, device="cpu")
    assert latency.batch_size == 5
    assert latency.baseline_seconds is not None
    assert latency.ratio is not None
    assert latency.baseline_seconds > 0
    assert latency.compressed_seconds > 0
    assert 0 < latency.ratio < math.inf
    assert latency.repeats >= 7
    assert model.training


@pytest.mark.parametrize(
    ("timing", "repeats"),
    [
        (TimingSettings(fewest_repeats=2, most_repeats=9, enough_seconds=0.0), 2),
        (TimingSettings(fewest_repeats=2, most_repeats=9, enough_seconds=60.0), 9),
    ],
    ids=["enough after the fewest repeats", "not enough before the most"],
)
def test_the_repeats_are_those_of_the_settings(timing, repeats):
    calls: list[int] = []
    model = nn.Linear(8, 8)
    model.register_forward_hook(lambda *_: calls.append(1))
    timed = measure_latency(model, {"inputs": torch.zeros(1, 8)}, device="cpu", timing=timing)
    assert timed.repeats == repeats
    assert len(calls) == timing.warm_ups + repeats


def test_each_repeat_runs_both_models_and_takes_turns_in_which_is_first():
    calls: list[str] = []

    class Recorded(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            return x

    latency = measure_latency(
        Recorded("compressed"), {"inputs": torch.zeros(1, 1)}, baseline=Recorded("baseline"), device="cpu"
    )
    timed = calls[-2 * latency.repeats :]
    pairs = [timed[i : i + 2] for i in range(0, len(timed), 2)]
    assert pairs[0::2] == [["compressed", "baseline"]] * len(pairs[0::2])
    assert pairs[1::2] == [["baseline", "compressed"]] * len(pairs[1::2])
    assert len(calls) > len(timed), "there is a warm-up"


def test_a_model_alone_has_no_ratio():
    latency = measure_latency(nn.Linear(8, 8), {"inputs": torch.zeros(1, 8)}, device="cpu")
    assert (latency.baseline_seconds, latency.ratio) == (None, None)
    assert latency.compressed_seconds > 0


def test_auto_is_cuda_where_there_is_one():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", "mps", "cuda:99999"])
def test_an_impossible_device_is_bad_input(name):
    with pytest.raises(BadInput, match="use"):
        resolve_device(name)


@pytest.mark.parametrize(("name", "number"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_cuda_device_has_its_number(monkeypatch, name, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device(name) == torch.device("cuda", number)
    with pytest.raises(BadInput, match="use cuda:0 to cuda:1"):
        resolve_device("cuda:2")


def test_resident_memory_is_no_more_than_the_largest_so_far() -> None:
    assert 0 < resident_memory() <= 1.01 * process_memory()  # the kernel counts pages in batches
