"""Low-rank layers compute what their dense product computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor import compress
from compressor.forms import LowRankConvolution, LowRankLinear, PivotedLinear
from compressor.lowrank import low_rank_layer
from compressor.planning import Budget, LayerPlan, Plan

CONVOLUTIONS = [
    (nn.Conv1d(6, 9, 5, stride=2, padding=2), (2, 6, 17)),
    (nn.Conv1d(6, 9, 3, padding="same", dilation=2, bias=False), (2, 6, 17)),
    (nn.Conv2d(6, 9, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 12, 14)),
    (nn.Conv2d(6, 9, 3, padding=1, padding_mode="reflect"), (2, 6, 8, 8)),
    (nn.Conv2d(6, 9, 3, padding=1, padding_mode="circular"), (2, 6, 8, 8)),
    (nn.Conv2d(16, 18, 1), (2, 16, 5, 5)),
    (nn.Conv3d(4, 8, 2, padding=1, padding_mode="replicate"), (1, 4, 5, 5, 5)),
]


def one_pair(form: str, rank: int) -> Plan:
    """A plan for a model that is a single layer."""
    return Plan("", None, Budget("plan"), (LayerPlan("", (0, 0), "", rank, form, 0, 0.0, ""),))


@pytest.mark.parametrize(("convolution", "shape"), CONVOLUTIONS)
def test_a_channel_pair_is_the_convolution_with_the_truncated_kernel(
    convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    low_rank = compress(convolution, plan=one_pair("channel", 3)).model
    assert isinstance(low_rank, LowRankConvolution)
    truncated = copy.deepcopy(convolution)
    left, values, right = torch.linalg.svd(convolution.weight.detach().double().flatten(1), full_matrices=False)
    rank = low_rank.rank
    kernel = (left[:, :rank] * values[:rank]) @ right[:rank]
    truncated.weight.data = kernel.reshape(convolution.weight.shape).float()
    x = torch.randn(shape)
    torch.testing.assert_close(low_rank(x), truncated(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in low_rank.parameters()) < sum(p.numel() for p in convolution.parameters())


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sides", [(20, 30), (30, 20)])
def test_a_linear_pair_is_the_layer_with_the_truncated_weight(form: str, bias: bool, sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(*sides, bias=bias)
    report = compress(dense, tolerance=0.6, form=form, prefer="size")  # type: ignore[arg-type]
    low_rank = report.model
    assert isinstance(low_rank, PivotedLinear if form == "pivoted" else LowRankLinear)
    left, values, right = torch.linalg.svd(dense.weight.detach().double(), full_matrices=False)
    rank = low_rank.rank
    weight = ((left[:, :rank] * values[:rank]) @ right[:rank]).float()
    x = torch.randn(2, 3, sides[0])
    torch.testing.assert_close(low_rank(x), nn.functional.linear(x, weight, dense.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_a_dense_loader_stops_at_a_compressed_state(form: str) -> None:
    dense = nn.Linear(40, 40)
    small = compress(dense, keep=0.5, form=form, prefer="size").model  # type: ignore[arg-type]
    assert small is not None
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        dense.load_state_dict(small.state_dict(), strict=False)


def test_flags_dtype_and_gradients_are_those_of_the_dense_layer() -> None:
    dense = nn.Linear(8, 6).to(torch.bfloat16).eval().requires_grad_(False)
    layer = low_rank_layer(dense, "plain", 2)
    assert not layer.training
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.weight.dtype == torch.bfloat16
    dense.bias.requires_grad_(True)
    trained = {name for name, each in low_rank_layer(dense, "plain", 2).named_parameters() if each.requires_grad}
    assert trained == {"up.bias"}


def test_low_rank_layers_train() -> None:
    small = compress(nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)), keep=0.6, prefer="size").model
    assert small is not None
    small(torch.randn(5, 20)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="Bilinear"):
        low_rank_layer(nn.Bilinear(2, 2, 2), "plain", 1)


def test_a_pair_of_convolutions_tells_the_geometry_of_the_dense_one() -> None:
    # Whisper, for one, computes the length of its inputs from the strides of its convolutions.
    dense = nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), padding_mode="reflect")
    for form in ("channel", "spatial"):
        pair = low_rank_layer(dense, form, 2)  # type: ignore[arg-type]
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            assert getattr(pair, name) == getattr(dense, name)


class Tied(nn.Module):
    """An embedding and a head with a bias that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(30, 20), nn.Linear(20, 30)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens))


SCRIPTED: dict[str, tuple[Callable[[], nn.Module], str, Tensor]] = {
    "linear": (lambda: nn.Linear(20, 30), "plain", torch.rand(3, 20)),
    "pivoted": (lambda: nn.Linear(20, 30), "pivoted", torch.rand(3, 20)),
    "pivoted without bias": (lambda: nn.Linear(20, 30, bias=False), "pivoted", torch.rand(3, 20)),
    "convolution": (lambda: nn.Conv2d(8, 12, 3, padding="same"), "channel", torch.rand(2, 8, 6, 6)),
    "spatial": (lambda: nn.Conv2d(8, 12, 3, padding=1), "spatial", torch.rand(2, 8, 6, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(8, 12, 3, stride=2), "channel", torch.rand(2, 8, 6)),
    "tied embedding": (Tied, "plain", torch.arange(12).reshape(3, 4)),
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_what_scripts_when_dense_scripts_when_it_is_low_rank(name: str) -> None:
    build, form, x = SCRIPTED[name]
    torch.manual_seed(0)
    dense = nn.Sequential(build())
    torch.jit.script(dense)
    layer = "0.words" if name.startswith("tied") else "0"
    planned = LayerPlan(layer, (0, 0), "", 4, form, 0, 0.0, "")
    small = compress(dense, embeddings=True, plan=Plan("", None, Budget("plan"), (planned,))).model
    assert small is not None
    assert small.get_submodule(layer).rank == 4
    scripted = torch.jit.script(small)
    torch.testing.assert_close(scripted(x), small(x))


def test_a_layer_with_a_pair_beside_it_scripts() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(20, 30))
    tuned = copy.deepcopy(base)
    tuned[0].weight.data += torch.rand(30, 1) @ torch.rand(1, 20)
    adapted = compress(tuned, base=base, keep=0.2).model
    assert adapted is not None
    x = torch.rand(3, 20)
    torch.testing.assert_close(torch.jit.script(adapted)(x), tuned(x), rtol=1e-4, atol=1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.slow
def test_a_model_with_factored_parameters_scripts_with_their_products_and_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    small = compress(Recurrent(), keep=0.5, prefer="size").model
    assert small is not None
    state, x = {name: each.clone() for name, each in small.state_dict().items()}, torch.rand(3, 2, 16)
    assert "rnn.weight_ih_l0.down.weight" in state
    for model in (small, copy.deepcopy(small)):
        model(x).sum().backward()  # recurrent layers keep the products, with their graph
        torch.testing.assert_close(torch.jit.script(model)(x), small(x))
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    with pytest.raises(RuntimeError, match="give it the whole model"):
        torch.jit.script(small.rnn)
