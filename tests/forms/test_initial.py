"""The forms of what training wrote: nothing is stored at rank 0, and the layer is dense with its weight formed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from compressor.factorize.settings import DEFAULTS
from compressor.forms import FORMS, InitialForm, InitialLayer, StoredWeight, pair_forms
from compressor.forms.initial import INITIAL
from compressor.network import Kind

DENSE: dict[Kind, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(7, 9), (2, 7)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 5, 5)),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "embedding": (nn.Embedding(11, 5, padding_idx=2), ()),
}
CASES = [(kind, form) for kind, (dense, _) in DENSE.items() for form in INITIAL
         if form.takes(StoredWeight(kind, tuple(dense.weight.shape)))]  # fmt: skip


def filled(kind: Kind, form: InitialForm, rank: int) -> tuple[nn.Module, InitialLayer]:
    """A dense layer, and what stands for its difference to a start at a rank."""
    torch.manual_seed(0)
    dense = copy.deepcopy(DENSE[kind][0])
    weight = StoredWeight(kind, tuple(dense.weight.shape))
    start = 0.7 * torch.randn(weight.shape, dtype=torch.float64)
    own = dense.weight.detach().double().flatten(1)
    matrix = own.T if kind in ("transposed convolution", "embedding") else own
    pair = form.approximate(weight, matrix - start, rank, metric=None, settings=DEFAULTS)
    layer = form.layer(dense, rank)
    assert isinstance(layer, InitialLayer)
    bias = {} if kind == "embedding" else {"bias": dense.bias}
    layer.load_state_dict({**form.stored(weight, pair, torch.float32), **bias, "weight": layer.weight})
    layer.fill_start(start)
    return dense, layer


@pytest.mark.parametrize(("kind", "form"), CASES, ids=lambda each: getattr(each, "name", each))
def test_at_full_rank_the_layer_is_the_dense_one(kind: Kind, form: InitialForm) -> None:
    weight = StoredWeight(kind, tuple(DENSE[kind][0].weight.shape))
    dense, layer = filled(kind, form, min(form.sides(weight)))
    shape = DENSE[kind][1]
    x = torch.randn(shape) if shape else torch.arange(11)
    for each in (layer, layer.formed()):
        torch.testing.assert_close(each(x), dense(x), rtol=1e-4, atol=1e-5)
    formed = layer.formed()
    assert type(formed) is type(dense)
    assert set(formed.state_dict()) == set(dense.state_dict())
    torch.testing.assert_close(formed.weight, dense.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "form"), CASES, ids=lambda each: getattr(each, "name", each))
def test_at_rank_0_nothing_but_the_start_is_left(kind: Kind, form: InitialForm) -> None:
    dense, layer = filled(kind, form, 0)
    weight = StoredWeight(kind, tuple(dense.weight.shape))
    assert form.infos(weight, 0, torch.float32) == []
    assert form.parameters(weight, 0) == form.nbytes(weight, 0, 4) == 0
    assert {name for name, _ in layer.named_parameters()} <= {"bias"}
    assert layer.start is not None
    turned = kind in ("transposed convolution", "embedding")
    assert torch.equal(layer.formed().weight.flatten(1), layer.start.T if turned else layer.start)
    assert layer.state_dict()["weight"].shape == (0, *dense.weight.shape)


@pytest.mark.parametrize("form", INITIAL, ids=lambda form: form.name)
def test_from_rank_1_on_as_much_is_stored_as_for_the_pair(form: InitialForm) -> None:
    kinds: tuple[StoredWeight, ...] = (StoredWeight("linear", (8, 6)), StoredWeight("convolution", (8, 6, 3, 3)))
    weight, ranks = next(each for each in kinds if form.takes(each)), np.arange(0, 5)
    assert form.parameters(weight, ranks)[0] == form.nbytes(weight, ranks, 2)[0] == 0
    assert (form.parameters(weight, ranks)[1:] == form.pair.parameters(weight, ranks[1:])).all()
    assert (form.nbytes(weight, ranks, 2)[1:] == form.pair.nbytes(weight, ranks[1:], 2)).all()


def test_the_factors_can_be_trained_and_the_start_stays() -> None:
    dense, layer = filled("linear", INITIAL[0], 2)
    before = None if layer.start is None else layer.start.clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x = torch.randn(5, 7)
    losses = []
    for _ in range(3):
        loss = (layer(x) - dense(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert before is not None
    assert layer.start is not None
    assert torch.equal(before, layer.start)
    assert {name for name, _ in layer.named_parameters()} == {"down.weight", "up.weight", "bias"}


def test_in_bfloat16_the_sum_is_rounded_once() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(7, 9, dtype=torch.bfloat16)
    layer = INITIAL[0].layer(dense, 2)
    assert isinstance(layer, InitialLayer)
    for factor in layer.factors.values():
        nn.init.normal_(factor)
    start = torch.randn(9, 7)
    layer.fill_start(start)
    up, down = (layer.factors[name].float() for name in ("up.weight", "down.weight"))
    assert torch.equal(layer.formed().weight, (start + up @ down).to(torch.bfloat16))


def test_a_layer_without_its_start_says_so() -> None:
    with pytest.raises(RuntimeError, match="initial weights"):
        INITIAL[0].layer(nn.Linear(3, 4), 1)(torch.zeros(1, 3))


def test_without_a_start_no_layer_can_become_such_a_pair() -> None:
    weight = StoredWeight("linear", (9, 7))
    assert not any(form.from_initial for form in pair_forms(weight))
    known = {form.name for form in pair_forms(weight, initial=True) if form.from_initial}
    assert known == {"initial+plain", "initial+pivoted"}
    assert {form.name for form in INITIAL} <= FORMS.keys()


def test_hooks_are_not_taken_along() -> None:
    dense, called = nn.Linear(7, 9), list[str]()
    dense.register_forward_hook(lambda *_: called.append("dense"))
    layer = INITIAL[0].layer(dense, 0)
    assert isinstance(layer, InitialLayer)
    layer.fill_start(torch.zeros(9, 7))
    layer(torch.zeros(1, 7))
    layer.formed()(torch.zeros(1, 7))
    assert called == []
