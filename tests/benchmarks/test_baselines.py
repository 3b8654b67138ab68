"""The published methods that we compare with, each against what its paper states."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

SHAPES = {"a": (96, 64), "b": (64, 96), "c": (128, 128)}


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import baselines  # type: ignore[import-not-found]

    yield baselines
    sys.modules.pop("baselines", None)


class Chain(nn.Module):
    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def chain() -> tuple[Chain, dict[str, nn.Module], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = Chain()
    mixing = torch.randn(24, 24)
    return (
        model,
        {"first": model.first, "second": model.second},
        [{"x": torch.randn(50, 24) @ mixing} for _ in range(4)],
    )


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("keep", [0.8, 0.4, 0.2])
def test_sizes_are_met_to_within_one_rank_and_never_exceeded(baselines: ModuleType, keep: float, form: str) -> None:
    target = int(keep * sum(d_out * d_in for d_out, d_in in SHAPES.values()))
    size = getattr(baselines, f"{form}_size")
    ranks = baselines.equalized(SHAPES, target, size)
    stored = baselines.stored(SHAPES, ranks, size)
    assert target - min(sum(shape) for shape in SHAPES.values()) < stored <= target


def test_svd_llm_loses_exactly_the_singular_values_it_drops(baselines: ModuleType) -> None:
    # Wang et al., theorem 3.2: ||W X - W' X||_F is the root of the sum of squares of the truncated singular values of W
    # S.
    torch.manual_seed(0)
    weight, inputs = torch.randn(20, 30, dtype=torch.float64), torch.randn(200, 30, dtype=torch.float64)
    moment = inputs.T @ inputs
    [replaced] = baselines.svd_llm({"a": weight}, {"a": 7}, {"a": moment}).values()
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment))
    torch.testing.assert_close(((weight - replaced) @ inputs.T).norm(), values[7:].norm())


def test_svd_llm_stands_dead_inputs(baselines: ModuleType) -> None:
    moment = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    [replaced] = baselines.svd_llm({"a": torch.eye(3, dtype=torch.float64)}, {"a": 2}, {"a": moment}).values()
    assert torch.isfinite(replaced).all()


def test_asvd_is_plain_where_all_activations_are_alike_and_exact_at_full_rank(baselines: ModuleType) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(12, 9, dtype=torch.float64)}
    alike = baselines.asvd(weights, {"a": 4}, {"a": torch.full((9,), 3.0)})["a"]
    torch.testing.assert_close(alike, baselines.plain_svd(weights, {"a": 4})["a"])
    scaled = baselines.asvd(weights, {"a": 9}, {"a": torch.rand(9) + 0.1})["a"]
    torch.testing.assert_close(scaled, weights["a"])


def test_the_sequential_update_is_nearer_to_the_dense_outputs_on_what_the_layer_really_gets(
    baselines: ModuleType,
) -> None:
    model, layers, batches = chain()
    ranks = {"first": 6, "second": 5}
    moments, _ = baselines.input_statistics(model, layers, batches)
    weights = baselines.matrices(layers)
    once = baselines.svd_llm(weights, ranks, moments)
    updated = baselines.svd_llm_sequential(model, layers, ranks, batches=batches, moments=moments)
    first = model.first
    with torch.no_grad():
        first.weight.copy_(updated["first"])
        got = torch.cat([torch.tanh(first(batch["x"])) for batch in batches]).double()
    wanted = got @ weights["second"].T
    assert torch.linalg.matrix_rank(updated["second"]) == 5
    assert (got @ updated["second"].T - wanted).norm() < (got @ once["second"].T - wanted).norm()


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(12, 9, 4), (9, 12, 9), (30, 30, 1)])
def test_pivoted_storage_is_lossless_and_as_small_as_its_paper_says(
    baselines: ModuleType, d_out: int, d_in: int, *, rank: int
) -> None:
    # Zhao et al.: r (m + n) - r^2 + r numbers, and the same product.
    torch.manual_seed(0)
    matrix = torch.randn(d_out, rank, dtype=torch.float64) @ torch.randn(rank, d_in, dtype=torch.float64)
    stored = baselines.pivoted_factors(matrix, rank)
    assert sum(tensor.numel() for tensor in stored) == rank * (d_out + d_in) - rank**2 + rank
    assert baselines.pivoted_size((d_out, d_in), rank) == sum(tensor.numel() for tensor in stored)
    torch.testing.assert_close(baselines.product(stored).double(), matrix, rtol=1e-5, atol=1e-5)
    rows, pivots = stored[1], stored[0].long()
    torch.testing.assert_close(rows.double(), matrix[pivots], rtol=1e-6, atol=1e-6)


def test_pivoted_storage_stands_a_matrix_of_lower_rank_than_it_is_given(baselines: ModuleType) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(10, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64)
    product = baselines.product(baselines.pivoted_factors(matrix, 5))
    torch.testing.assert_close(product.double(), matrix, rtol=1e-5, atol=1e-5)


def test_plain_storage_is_the_matrix_in_two_factors(baselines: ModuleType) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 3, dtype=torch.float64) @ torch.randn(3, 9, dtype=torch.float64)
    up, down = baselines.factors(matrix, 3)
    assert up.numel() + down.numel() == baselines.plain_size((12, 9), 3)
    torch.testing.assert_close(baselines.product((up, down)).double(), matrix, rtol=1e-5, atol=1e-5)


def chain_inputs(model: Chain, first: Tensor, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The second layer's inputs `(N, 32)` behind the dense first layer and behind another one, in float64."""
    x = torch.cat([batch["x"] for batch in batches])
    with torch.no_grad():
        dense = torch.tanh(model.first(x))
        compressed = torch.tanh(nn.functional.linear(x, first.float(), model.first.bias))
    return dense.double(), compressed.double()


def test_mpifa_fits_each_factor_to_its_mixture_of_targets(baselines: ModuleType) -> None:
    # Zhao et al.: U minimizes ||Y - U V X'||, then V minimizes ||Y - U V X'||^2 + e ||U^+ W - V||^2 within
    # the columns of U, Y the mixture. numpy's least squares, on the inputs themselves, is the oracle.
    model, layers, batches = chain()
    ranks = {"first": 6, "second": 5}
    moments, _ = baselines.input_statistics(model, layers, batches)
    weight = baselines.matrices(layers)["second"]
    updated = baselines.mpifa(model, layers, ranks, batches=batches, moments=moments)
    dense, compressed = (each.numpy() for each in chain_inputs(model, updated["first"], batches))
    wanted = (0.75 * compressed + 0.25 * dense) @ weight.numpy().T  # one position a row
    whitened = baselines.svd_llm({"second": weight}, ranks, moments)["second"]
    right = torch.linalg.svd(whitened).Vh[:5].numpy()
    left = np.linalg.lstsq(compressed @ right.T, wanted, rcond=None)[0].T
    stacked = np.concatenate([compressed, np.sqrt(1e-3) * np.eye(32)])
    targets = np.concatenate([wanted, np.sqrt(1e-3) * weight.numpy().T]) @ np.linalg.pinv(left).T
    refitted = left @ np.linalg.lstsq(stacked, targets, rcond=None)[0].T
    np.testing.assert_allclose(updated["second"].numpy(), refitted, rtol=1e-4, atol=1e-5)


def test_mpifa_is_nearer_to_the_dense_outputs_than_what_it_starts_from(baselines: ModuleType) -> None:
    model, layers, batches = chain()
    ranks = {"first": 6, "second": 5}
    moments, _ = baselines.input_statistics(model, layers, batches)
    weights = baselines.matrices(layers)
    once = baselines.svd_llm(weights, ranks, moments)
    updated = baselines.mpifa(model, layers, ranks, batches=batches, moments=moments)
    dense, compressed = chain_inputs(model, updated["first"], batches)
    wanted = dense @ weights["second"].T
    assert torch.linalg.matrix_rank(updated["second"], rtol=1e-9) == 5
    assert (compressed @ updated["second"].T - wanted).norm() < (compressed @ once["second"].T - wanted).norm()


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.parametrize("build", [tiny_llama, tiny_vit])
def test_layers_are_replaced_in_the_order_of_the_papers(baselines: ModuleType, build: Callable[[], nn.Module]) -> None:
    # q, k and v; then the projection of their output; then the layers into the MLP; then the one out of it.
    model = build()
    head = {"lm_head", "classifier"}
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name not in head}
    batch = {"input_ids": torch.arange(10)[None]} if build is tiny_llama else {"pixel_values": torch.randn(2, 1, 8, 8)}
    groups = baselines.sharing_an_input(model, layers, batch)
    into_mlp = 2 if build is tiny_llama else 1
    assert [len(group) for group in groups] == [3, 1, into_mlp, 1] * 2
    assert sorted(name for group in groups for name in group) == sorted(layers)
    assert list(dict.fromkeys(int(part) for group in groups for part in group[0].split(".") if part.isdecimal())) == [
        0,
        1,
    ]


def test_inputs_are_those_of_a_whole_pass_though_the_pass_ends_early(baselines: ModuleType) -> None:
    model = tiny_llama()
    ended = []
    model.model.norm.register_forward_hook(lambda *_: ended.append(True))  # type: ignore[union-attr]
    name = "model.layers.1.self_attn.o_proj"
    batch = {"input_ids": torch.arange(10)[None]}
    with torch.no_grad():
        found = baselines.layer_inputs(model, {name: model.get_submodule(name)}, batch)[name]
        assert not ended
        seen = []
        model.get_submodule(name).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        model(**batch)
    torch.testing.assert_close(found, seen[0], rtol=0, atol=0)


def test_a_convolution_is_its_matrix_on_patches(baselines: ModuleType) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 3, 7, 7)
    vectors = baselines.input_vectors(layer, x)
    outputs = vectors @ baselines.matrices({"a": layer})["a"].T
    torch.testing.assert_close(outputs.float(), layer(x).permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-4, atol=1e-5)
