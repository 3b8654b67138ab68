"""The kernels that a form says it launches do what its module does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compressor.forms import DENSE, FORMS, InitialLayer, StoredWeight, dense_kernels, predicted_seconds
from compressor.latency import SHIPPED, Kernel, LayerUse
from compressor.lowrank import low_rank_layer, put_pair
from tests.forms.diagonal import DIAGONAL

PROFILE = SHIPPED["cpu"]


@dataclass(frozen=True)
class Case:
    """A layer, its inputs, and how they use it."""

    weight: StoredWeight
    dense: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    use: LayerUse


def linear() -> Case:
    return Case(StoredWeight("linear", (40, 30)), lambda: nn.Linear(30, 40), (2, 5, 30), LayerUse(rows=10, bias=True))


CASES = {
    "linear": linear(),
    "convolution": Case(
        StoredWeight("convolution", (12, 8, 3, 5)),
        lambda: nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 0)),
        (2, 8, 9, 11),
        LayerUse(batch=2, in_size=(9, 11), out_size=(5, 7), bias=True),
    ),
    "convolution of a line": Case(
        StoredWeight("convolution", (12, 8, 3)),
        lambda: nn.Conv1d(8, 12, 3),
        (2, 8, 9),
        LayerUse(batch=2, in_size=(9,), out_size=(7,)),
    ),
    "grouped convolution": Case(
        StoredWeight("grouped convolution", (12, 8, 3, 5), 2),
        lambda: nn.Conv2d(16, 12, (3, 5), stride=(2, 1), padding=(1, 0), groups=2),
        (2, 16, 9, 11),
        LayerUse(batch=2, in_size=(9, 11), out_size=(5, 7), bias=True),
    ),
    "transposed convolution": Case(
        StoredWeight("transposed convolution", (8, 12, 3, 3)),
        lambda: nn.ConvTranspose2d(8, 12, 3, stride=2),
        (2, 8, 4, 5),
        LayerUse(batch=2, in_size=(4, 5), out_size=(9, 11)),
    ),
}


def flops(kernels: Sequence[Kernel]) -> float:
    return sum(float(kernel.flops) for kernel in kernels)


QUANTIZED = [
    FORMS[name] for name in ("dense@8", "dense@3g2", "plain@8", "plain@4g2", "pivoted@8", "channel@8", "grouped@8")
]


def counted(module: nn.Module, x: Tensor) -> int:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.zero_()  # the values of an unfilled order are no numbers of rows
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_that_the_module_of_each_form_runs(name: str) -> None:
    case = CASES[name]
    x = torch.randn(case.inputs)
    assert flops(dense_kernels(case.weight, case.use, itemsize=4)) == counted(case.dense(), x)
    for form in (form for form in (*FORMS.values(), *QUANTIZED) if form.takes(case.weight)):
        kernels = form.kernels(case.weight, 3, case.use, itemsize=4)
        layer = low_rank_layer(case.dense(), form.name, 3)
        if isinstance(layer, InitialLayer):
            layer.load_state_dict({name: torch.zeros_like(each) for name, each in layer.state_dict().items()})
            layer.fill_start(torch.zeros(case.weight.shape))
            layer = layer.formed()
        assert flops(kernels) == counted(layer, x)


class Tied(nn.Module):
    """An embedding and the head tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def test_a_head_that_is_tied_to_an_embedding_is_counted_with_it() -> None:
    weight, x = StoredWeight("embedding", (50, 16)), torch.zeros(2, 5, dtype=torch.long)
    use, alone = LayerUse(rows=10, head_rows=10), LayerUse(rows=10)
    assert flops(dense_kernels(weight, use, itemsize=4)) == counted(Tied(), x)
    assert flops(dense_kernels(weight, alone, itemsize=4)) == 0
    pair = put_pair(Tied(), "table", "plain", rank=3)
    assert flops(FORMS["plain"].kernels(weight, 3, use, itemsize=4)) == counted(pair, x)
    assert flops(FORMS["plain"].kernels(weight, 3, alone, itemsize=4)) == counted(pair.table, x)


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("rows", [0, 100])
def test_a_parameter_as_factors_is_never_faster(form: str, rows: int) -> None:
    weight, use = StoredWeight("parameter", (64, 48)), LayerUse(rows=rows)
    ranks = np.arange(1, 49)
    pair = predicted_seconds(PROFILE, weight, form, rank=ranks, use=use, dtype=torch.float32)
    dense = predicted_seconds(PROFILE, weight, DENSE, rank=ranks, use=use, dtype=torch.float32)
    assert (pair > dense).all()


def test_a_form_that_says_nothing_runs_like_a_plain_pair_of_its_bytes() -> None:
    case = CASES["linear"]
    own = flops(DIAGONAL.kernels(case.weight, 3, case.use, itemsize=4))
    plain = flops(FORMS["plain"].kernels(case.weight, 3, case.use, itemsize=4))
    assert own == pytest.approx(plain * (40 + 30 + 1) / (40 + 30))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", SHIPPED)
def test_seconds_at_many_ranks_are_those_at_each(name: str, device: str) -> None:
    case, ranks = CASES[name], np.arange(1, 25)
    for form in (DENSE, *(form.name for form in (*FORMS.values(), *QUANTIZED) if form.takes(case.weight))):

        def seconds(rank: int | np.ndarray, form: str = form) -> float | np.ndarray:
            return predicted_seconds(SHIPPED[device], case.weight, form, rank=rank, use=case.use, dtype=torch.bfloat16)

        each = [seconds(int(rank)) for rank in ranks]
        np.testing.assert_allclose(seconds(ranks), each, rtol=1e-12)
        assert min(each) > 0


def test_integers_are_read_in_less_time_than_numbers_of_16_bits_at_one_row_and_not_at_many() -> None:
    weight = StoredWeight("linear", (4096, 1536))

    def seconds(form: str, rows: int, dtype: torch.dtype = torch.bfloat16) -> float:
        return float(predicted_seconds(SHIPPED["cpu"], weight, form, rank=0, use=LayerUse(rows=rows), dtype=dtype))

    for form in ("dense@8", "dense@4g128"):
        assert seconds(form, 1) < seconds(DENSE, 1) / 1.3
    for form in ("dense@4g128", "dense@3g64", "dense@6g128"):
        assert seconds(form, 512) > seconds(DENSE, 512)
        assert seconds("dense@4g128", 1) <= seconds(form, 1) < 1.1 * seconds(DENSE, 1)
    # No kernel takes zero points, groups of 48, or float32: the weight is dequantized.
    for form, dtype in (("dense@3g64z", torch.bfloat16), ("dense@4g48", torch.bfloat16), ("dense@4g64", torch.float32)):
        assert seconds(form, 1, dtype) > 2 * seconds(DENSE, 1, dtype)


def test_kernels_are_predicted_at_the_ranks_that_they_take() -> None:
    weight, use, ranks = StoredWeight("linear", (1024, 1024)), LayerUse(rows=1), np.array([127, 128, 129])
    off, on, beyond = predicted_seconds(PROFILE, weight, "plain@4g128", rank=ranks, use=use, dtype=torch.bfloat16)
    assert 2 * on < min(off, beyond)


def test_each_call_of_a_layer_takes_as_long() -> None:
    case = CASES["linear"]
    once = predicted_seconds(PROFILE, case.weight, DENSE, rank=1, use=LayerUse(rows=10), dtype=torch.float32)
    thrice = predicted_seconds(PROFILE, case.weight, DENSE, rank=1, use=LayerUse(rows=10, calls=3), dtype=torch.float32)
    assert thrice == pytest.approx(3 * once)


def test_groups_of_few_channels_in_between_are_not_taken_to_be_fast() -> None:
    """Each group fills blocks of channels by itself: 32 groups of one channel each run like 32 of a whole block."""
    use, ranks = LayerUse(batch=8, in_size=(14, 14), out_size=(14, 14)), np.array([1, 2, 4])
    narrow = StoredWeight("grouped convolution", (256, 8, 3, 3), 32)
    wide = StoredWeight("grouped convolution", (128, 32, 3, 3), 4)
    for weight, faster in ((narrow, False), (wide, True)):
        dense, pair = (
            predicted_seconds(PROFILE, weight, form, rank=ranks, use=use, dtype=torch.float32)
            for form in (DENSE, "grouped")
        )
        assert ((pair < dense) == faster).all()
