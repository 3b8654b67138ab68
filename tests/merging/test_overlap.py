"""How much networks overlap: angles against SciPy's, interference against its definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from torch import Tensor, nn

from compressor.data import Batch, EvaluationData
from compressor.lowrank import low_rank_layer
from compressor.merging import principal_cosines, row_space
from compressor.merging.overlap import (
    data_overlap,
    layer_overlap,
    measured_interference,
    output_change,
    row_space_overlap,
)

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def examples(inputs: Tensor, name: str = "inputs") -> EvaluationData:
    def read(positions: Sequence[int]) -> Batch:
        return Batch({name: inputs[list(positions)]}, torch.zeros(len(positions), dtype=torch.int64))

    return EvaluationData("test", "classification", len(inputs), 4, read)


@given(d=st.integers(2, 12), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=30)
def test_principal_angles_are_those_of_scipy(d: int, seed: int, data: st.DataObject) -> None:
    ranks = [data.draw(st.integers(1, d)) for _ in range(2)]
    first, second = (normal(d, rank, seed=seed + i) for i, rank in enumerate(ranks))
    bases = [torch.linalg.qr(each).Q for each in (first, second)]
    angles = np.arccos(principal_cosines(*bases).numpy())
    np.testing.assert_allclose(np.sort(angles), np.sort(subspace_angles(first.numpy(), second.numpy())), atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_row_space_is_that_of_the_leading_right_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = normal(*shape) @ torch.diag(torch.logspace(0, -4, shape[1], dtype=torch.float64))
    basis = row_space(matrix)
    values, right = torch.linalg.svd(matrix)[1:]
    rank = int((values.square().cumsum(0) < 0.99 * values.square().sum()).sum()) + 1
    assert basis.shape == (shape[1], rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.T, right[:rank].T @ right[:rank])


def test_a_zero_matrix_has_no_row_space_and_interferes_with_nothing() -> None:
    zero, other = torch.zeros(3, 4, dtype=torch.float64), normal(3, 4)
    assert row_space(zero).shape == (4, 0)
    found = layer_overlap("a", [zero, other], None)
    assert found.subspace == 0
    assert found.interference == (0.0, 0.0)


def test_disjoint_rows_do_not_overlap_and_equal_ones_do_wholly() -> None:
    left = torch.cat([normal(4, 3), torch.zeros(4, 3, dtype=torch.float64)], dim=1)
    right = left.flip(1)
    apart, same = (layer_overlap("a", pair, None) for pair in ([left, right], [left, left.clone()]))
    assert apart.subspace == pytest.approx(0, abs=1e-12)
    assert apart.smallest_angle == pytest.approx(90)
    assert apart.interference == pytest.approx((0, 0), abs=1e-12)
    assert same.subspace == pytest.approx(1)
    assert same.smallest_angle == pytest.approx(0, abs=1e-4)
    assert same.interference == pytest.approx((1, 1))
    assert row_space_overlap([left, right]).largest == pytest.approx(0, abs=1e-12)
    assert row_space_overlap([left, left]).mean == pytest.approx(1)


def test_what_random_subspaces_share_is_what_is_expected_of_them() -> None:
    found = [
        layer_overlap("a", [normal(6, 120, seed=seed), normal(6, 120, seed=1000 + seed)], None) for seed in range(40)
    ]
    assert np.mean([each.subspace for each in found]) == pytest.approx(
        np.mean([each.random for each in found]), rel=0.1
    )


def test_interference_without_data_is_that_on_inputs_from_the_row_space() -> None:
    first, second = normal(5, 8, seed=1), normal(5, 8, seed=2)
    found = layer_overlap("a", [first, second], None).interference
    assert found is not None
    inputs = first.T @ normal(5, 200_000, seed=3)
    assert found[0] == pytest.approx(float((second @ inputs).norm() / (first @ inputs).norm()), rel=0.01)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


@torch.no_grad()
def test_interference_on_data_is_the_others_answer_to_what_a_layer_sees() -> None:
    nets = [network(seed) for seed in range(3)]
    data = [examples(normal(10, 6, seed=seed)) for seed in range(3)]
    found = measured_interference(nets, data, device=CPU)
    for task, net in enumerate(nets):
        hidden = normal(10, 6, seed=task)
        for name in ("0", "2"):
            own = net.get_submodule(name).weight
            others = torch.stack([o.get_submodule(name).weight for o in nets if o is not net]).sum(0)  # type: ignore[arg-type]
            expected = (hidden @ others.T).norm() / (hidden @ own.T).norm()  # type: ignore[operator]
            assert found[name][task] == pytest.approx(float(expected))
            hidden = (hidden @ own.T + net.get_submodule(name).bias).relu()  # type: ignore[operator]


@torch.no_grad()
def test_with_a_base_what_interferes_is_what_the_others_added_to_it() -> None:
    base, first = network(0), network(1)
    data = [examples(normal(8, 6, seed=seed)) for seed in range(2)]
    found = measured_interference([first, base], data, device=CPU, base=base)
    assert found["0"][0] == pytest.approx(0, abs=1e-12)
    x = normal(8, 6, seed=1)
    change = x @ (first[0].weight - base[0].weight).T
    assert found["0"][1] == pytest.approx(float(change.norm() / (x @ base[0].weight.T).norm()))


@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_a_low_rank_layer_is_one_layer(form: str) -> None:
    nets: list[nn.Module] = [nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)) for _ in range(2)]
    for net in nets:
        pair = low_rank_layer(net.get_submodule("0"), form, 2)
        for parameter in pair.parameters():
            nn.init.normal_(parameter)
        net.set_submodule("0", pair)
    found = measured_interference(nets, [examples(torch.randn(4, 2, 4, 4))] * 2, device=CPU)
    assert list(found) == ["0", "2"]


def test_measuring_leaves_no_hook_behind() -> None:
    nets = [network(seed).train() for seed in range(2)]
    measured_interference(nets, [examples(normal(4, 6))] * 2, device=CPU)
    assert all(not module._forward_pre_hooks and module.training for net in nets for module in net.modules())


def test_input_angles_are_those_between_examples_of_two_tasks() -> None:
    first, second = torch.tensor([[3.0, 0, 0], [0, 2, 0]]), torch.tensor([[1.0, 0, 1]])
    found = data_overlap([examples(first), examples(second)], [network(0)] * 2)
    assert found is not None
    assert (found.largest, found.mean) == pytest.approx((0.5**0.5, 0.5**0.5 / 2))


class Embedder(nn.Module):
    """A model that embeds tokens as rows of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def test_input_angles_of_language_models_are_those_of_the_tokens_as_each_embeds_its_own() -> None:
    first, second = normal(9, 4, seed=1), normal(9, 4, seed=2)
    tokens = [torch.tensor([[0, 1, 2]]), torch.tensor([[3, 3]])]
    found = data_overlap([examples(each, "input_ids") for each in tokens], [Embedder(first), Embedder(second)])
    assert found is not None
    cosines = nn.functional.cosine_similarity(first[:3], second[[3]]).abs()
    assert found.source == "embeddings"
    assert (found.largest, found.mean) == pytest.approx((float(cosines.max()), float(cosines.mean())))


def test_padding_is_no_token() -> None:
    table = torch.eye(3).double()
    task = EvaluationData(
        "padded",
        "classification",
        1,
        1,
        lambda _: Batch(
            {"input_ids": torch.tensor([[0, 2]]), "attention_mask": torch.tensor([[1, 0]])}, torch.zeros(1).long()
        ),
    )
    other = examples(torch.tensor([[2]]), "input_ids")
    found = data_overlap([task, other], [Embedder(table)] * 2)
    assert found is not None
    assert found.largest == 0


def test_token_numbers_without_embeddings_have_no_angles() -> None:
    tokens = examples(torch.ones(2, 3, dtype=torch.int64), "input_ids")
    assert data_overlap([tokens, tokens], [network(0)] * 2) is None


def test_the_change_of_outputs_is_relative_to_their_size() -> None:
    first = network(0)
    doubled = nn.Sequential(first, nn.Linear(3, 3, bias=False).double())
    with torch.no_grad():
        doubled[1].weight.copy_(2 * torch.eye(3))
    assert output_change(first, doubled, examples(normal(9, 6)), device=CPU) == pytest.approx(1)
