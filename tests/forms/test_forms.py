"""Every form says the same of itself in all it says: sizes, tensors, matrices, modules."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import BadInput, compress, restore
from compressor.factorize import GroupedMetric, Metric, SpatialPair
from compressor.factorize.settings import DEFAULTS
from compressor.forms import (
    DENSE,
    FORMS,
    Approximations,
    InitialLayer,
    PairForm,
    StoredWeight,
    pair_forms,
    pair_name,
    recognized,
    stored_bytes,
    stored_parameters,
)
from compressor.forms.quantized import QuantizedPair
from compressor.forms.spatial import SpatialForm
from compressor.forms.weights import DenseWeight
from compressor.model import load_model
from compressor.network import Kind
from compressor.planning import Budget, LayerPlan, Plan
from compressor.quantize import Quantization
from tests.forms.diagonal import DIAGONAL, ROOT, DiagonalLinear

QUANTIZED = tuple(
    FORMS[name]
    for name in (
        *(
            "dense@8",
            "dense@4g24",
            "dense@3g2z",
            "plain@8",
            "plain@4g2z",
            "pivoted@6",
            "channel@5g24",
            "spatial@8",
            "grouped@4g24",
        ),
        *("initial+dense@4g24", "initial+plain@8"),
    )
)
ALL = (*FORMS.values(), *QUANTIZED, DIAGONAL, ROOT)
DENSE_MODULES: dict[Kind, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(48, 9), (2, 48)),
    "convolution": (nn.Conv2d(16, 6, 3), (2, 16, 5, 5)),
    "grouped convolution": (nn.Conv2d(12, 6, 3, groups=3), (2, 12, 5, 5)),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "embedding": (nn.Embedding(11, 5), ()),
}


@pytest.fixture(params=[DIAGONAL, ROOT], ids=lambda form: form.name)
def registered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PairForm:
    form: PairForm = request.param
    monkeypatch.setitem(FORMS, form.name, form)
    return form


@st.composite
def weights(draw: st.DrawFn) -> StoredWeight:
    side = st.integers(1, 7) | st.just(48)
    kind: Kind = draw(
        st.sampled_from(
            [
                *("linear", "transposed linear", "parameter", "embedding"),
                *("convolution", "grouped convolution", "transposed convolution"),
            ]
        )
    )
    kernel = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))] if "convolution" in kind else []
    groups = draw(st.integers(2, 4)) if kind == "grouped convolution" else 1
    return StoredWeight(kind, (groups * draw(side), draw(side), *kernel), groups)


def taken_by(form: PairForm) -> StoredWeight:
    """A weight that a form takes, a convolution's if it can be."""
    kernels, others = (
        (StoredWeight("convolution", (6, side, 3, 3)) for side in (5, 48)),
        (StoredWeight("linear", (6, 48)), StoredWeight("grouped convolution", (6, 8, 3, 3), 2)),
    )
    return next(each for each in (*kernels, *others) if form.takes(each))


def metric_of(weight: StoredWeight) -> Metric:
    """Moments of random vectors, of every group by itself."""
    d_out, d_in = weight.shape
    sides = (d_in, d_out // weight.groups)
    vectors = [torch.randn(weight.groups, side, 2 * side, dtype=torch.float64) for side in sides]
    inputs, gradients = (each @ each.mT for each in vectors)
    return Metric(inputs[0], gradients[0]) if weight.groups == 1 else GroupedMetric(inputs, gradients)


def stood_for(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors, and in the place of quantized ones of those that they stand for."""
    shapes = {name: tuple(each.shape) for name, each in tensors.items() if "weight_" not in name}
    told = {name.removesuffix("_shape"): each for name, each in tensors.items() if name.endswith("weight_shape")}
    return shapes | {name: tuple(each.tolist()) for name, each in told.items()}


def wide(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Scales of 16 bits are multiplied in a wider dtype."""
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}


@given(weights(), st.data())
def test_what_a_form_stores_is_what_it_says_and_reads(weight: StoredWeight, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([form for form in ALL if form.takes(weight)]))
    sides = form.sides(weight)
    assert weight.groups * math.prod(sides) == math.prod(weight.tensor_shape)
    rank = data.draw(st.integers(form.least_rank if form in QUANTIZED else 1, min(sides)))
    matrix = torch.randn(weight.shape, dtype=torch.float64)
    pair = form.approximate(weight, matrix, rank, metric=None, settings=DEFAULTS)
    stored, infos = form.stored(weight, pair, torch.float32), form.infos(weight, rank, torch.float32)
    assert [info.name for info in infos] == list(form.names_at(rank))
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()} == {
        info.name: (info.shape, info.dtype) for info in infos
    }
    assert form.nbytes(weight, rank, 4) == sum(info.nbytes for info in infos)
    # A size that is asked for as a share is one of 16-bit bytes, and nothing that is stored may be left out.
    stored_bytes = sum(info.nbytes for info in form.infos(weight, rank, torch.float16))
    assert form.parameters(weight, rank) == -(-stored_bytes // 2)
    ranks = np.arange(form.least_rank, min(sides) + 1)
    assert form.parameters(weight, ranks)[rank - form.least_rank] == form.parameters(weight, rank)
    assert form.nbytes(weight, ranks, 2)[rank - form.least_rank] == form.nbytes(weight, rank, 2)
    if form.from_initial and rank == 0 and not infos:
        return
    read = form.read(weight.kind, stood_for(stored))
    assert read is not None
    assert (read.rank, read.tensor_shape) == (rank, weight.tensor_shape)
    assert rank == 0 or read.groups == weight.groups
    assert form.defect(rank, stored.__getitem__) is None
    product = form.product(weight, wide(stored, torch.float32))
    torch.testing.assert_close(product, pair.product().float(), rtol=1e-4, atol=1e-4)


@given(weights(), st.data())
def test_a_pair_that_is_only_compared_stands_for_the_same_matrix(weight: StoredWeight, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([form for form in ALL if form.takes(weight)]))
    assert form.compared.takes(weight)
    assert form.compared.sides(weight) == form.sides(weight)
    matrix, rank = torch.randn(weight.shape, dtype=torch.float64), data.draw(st.integers(1, min(form.sides(weight))))
    one, other = (
        each.product(weight, wide(each.stored(weight, found, torch.float64), torch.float64))
        for each in (form, form.compared)
        for found in [each.approximate(weight, matrix, rank, metric=None, settings=DEFAULTS)]
    )
    torch.testing.assert_close(one, other)


@given(weights(), st.data())
def test_tensors_are_recognized_as_a_form_of_the_same_product(weight: StoredWeight, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(pair_forms(weight)))
    rank = data.draw(st.integers(1, min(form.sides(weight))))
    found = recognized(weight.kind, {info.name: info.shape for info in form.infos(weight, rank, torch.float32)})
    assert found is form


@pytest.mark.parametrize("kind", DENSE_MODULES)
def test_the_module_of_a_form_has_its_tensors_and_does_what_its_matrix_does(kind: Kind) -> None:
    torch.manual_seed(0)
    dense, shape = DENSE_MODULES[kind]
    weight = StoredWeight(kind, tuple(dense.weight.shape), 3 if kind == "grouped convolution" else 1)
    x = torch.randn(shape) if shape else torch.arange(11)
    for form in (form for form in ALL if form.takes(weight)):
        matrix = torch.randn(weight.shape, dtype=torch.float64)
        pair = form.approximate(weight, matrix, 2, metric=None, settings=DEFAULTS)
        stored = form.stored(weight, pair, torch.float32)
        product = form.product(weight, wide(stored, torch.float32))
        turned = kind in ("transposed convolution", "embedding")
        dense.weight.data = (product.T if turned else product).reshape(weight.tensor_shape)
        layer = form.layer(dense, 2)
        bias = {} if kind == "embedding" else {form.bias: dense.bias}
        marker = {} if form.marker(weight) is None else {"weight": layer.weight}
        layer.load_state_dict({**stored, **bias, **marker}, strict=True)
        if isinstance(layer, InitialLayer):
            layer.fill_start(torch.zeros(weight.shape))
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
        assert type(layer) in form.classes


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)
def test_a_form_refuses_modules_that_it_is_not_for(form: PairForm) -> None:
    with pytest.raises(ValueError, match="Bilinear"):
        form.layer(nn.Bilinear(2, 2, 2), 1)


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)
def test_tensors_that_do_not_fit_together_are_told(form: PairForm) -> None:
    weight = taken_by(form)
    pair = form.approximate(weight, torch.randn(weight.shape), 2, metric=None, settings=DEFAULTS)
    stored = form.stored(weight, pair, torch.float32)
    shapes = stood_for(stored)
    assert form.read(weight.kind, shapes) is not None
    for name, shape in shapes.items():
        wrong = (shape[0], shape[1] + 1, *shape[2:]) if name == "up.weight" else (shape[0] + 1, *shape[1:])
        assert form.read(weight.kind, shapes | {name: wrong}) is None


@pytest.mark.parametrize("in_metric", [False, True])
@pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form.name)
def test_errors_are_those_of_what_is_stored(form: PairForm, in_metric: bool) -> None:
    torch.manual_seed(0)
    weight = taken_by(form)
    matrix = torch.randn(weight.shape, dtype=torch.float64)
    metric = metric_of(weight) if in_metric else None
    errors = Approximations(weight=weight, matrix=matrix, metric=metric, settings=DEFAULTS).errors(form)
    sides = form.sides(weight)
    ranks = (0,) if pair_name(form.name).endswith(DENSE) else (1, max(1, math.prod(sides) // sum(sides)))
    assert len(errors) in (1, min(form.sides(weight)) + 1)
    for rank in ranks:
        pair = form.approximate(weight, matrix, rank, metric=metric, settings=DEFAULTS)
        changed, total = (
            each.square().sum() if metric is None else metric.squared_size(each)
            for each in (matrix - pair.product(), matrix)
        )
        # In a metric the errors that would be made are simulated, or made without refinement.
        assert errors[rank] == pytest.approx(math.sqrt(changed / total), rel=0.4 if in_metric else 1e-6)


def test_what_widths_have_in_common_is_computed_once() -> None:
    torch.manual_seed(0)
    weight = StoredWeight("convolution", (6, 48, 3, 3))
    matrix, metric = torch.randn(weight.shape, dtype=torch.float64), metric_of(weight)
    solved: list[int] = []

    class Counted(SpatialForm):
        def approximate(self, weight: DenseWeight, matrix: Tensor, rank: int, **asked: Any) -> SpatialPair:
            solved.append(rank)
            return super().approximate(weight, matrix, rank, **asked)

    forms = [QuantizedPair.of(Counted(), Quantization(bits)) for bits in (8, 6, 4)]
    shared = Approximations(weight=weight, matrix=matrix, metric=metric, settings=DEFAULTS)
    together = [shared.errors(form) for form in forms]
    assert len(solved) == len(set(solved)) == DEFAULTS.quantized_ranks
    apart = [
        Approximations(weight=weight, matrix=matrix, metric=metric, settings=DEFAULTS).errors(form) for form in forms
    ]
    assert len(solved) == 4 * DEFAULTS.quantized_ranks
    assert all(np.array_equal(one, other) for one, other in zip(together, apart, strict=True))


def test_forms_that_store_the_truncated_svd_share_it() -> None:
    torch.manual_seed(0)
    weight = StoredWeight("linear", (6, 48))
    matrix, metric = torch.randn(weight.shape, dtype=torch.float64), metric_of(weight)
    shared = Approximations(weight=weight, matrix=matrix, metric=metric, settings=DEFAULTS)
    assert shared.pair(FORMS["plain"], 3) is shared.pair(FORMS["pivoted"], 3)
    for form in (each for each in QUANTIZED if each.takes(weight)):
        alone = Approximations(weight=weight, matrix=matrix, metric=metric, settings=DEFAULTS)
        assert np.array_equal(shared.errors(form), alone.errors(form))


def test_the_size_of_a_matrix_is_computed_once_for_all_forms() -> None:
    torch.manual_seed(0)
    weight = StoredWeight("linear", (6, 48))
    matrix, plain = torch.randn(weight.shape, dtype=torch.float64), metric_of(weight)
    assert isinstance(plain, Metric)
    sizes: list[Tensor] = []

    class Counted(Metric):
        def squared_size(self, matrix: Tensor) -> float:
            sizes.append(matrix / matrix.norm())
            return super().squared_size(matrix)

    metric = Counted(plain.inputs, plain.gradients)
    shared = Approximations(weight=weight, matrix=matrix, metric=metric, settings=DEFAULTS)
    for form in (each for each in QUANTIZED if each.takes(weight)):
        shared.errors(form)
    own = [each for each in sizes if each.shape == matrix.shape and torch.allclose(each, matrix / matrix.norm())]
    assert len(own) == 1
    assert len(sizes) > 3


@pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form.name)
def test_scales_that_are_not_finite_are_told(form: PairForm) -> None:
    weight = taken_by(form)
    pair = form.approximate(weight, torch.randn(weight.shape), 2, metric=None, settings=DEFAULTS)
    stored = form.stored(weight, pair, torch.bfloat16)
    for name in (name for name in form.names_at(2) if name.endswith("weight_scale")):
        broken = {**stored, name: torch.full_like(stored[name], math.nan)}
        assert (form.defect(2, broken.__getitem__) or "").startswith(name)


def test_forms_are_values() -> None:
    with pytest.raises(FrozenInstanceError):
        FORMS["plain"].name = "other"  # type: ignore[misc]
    assert all(name == form.name for name, form in FORMS.items())


@pytest.mark.parametrize("form", ["dense", "plain", "channel"])
def test_forms_without_an_order_cost_their_numbers(form: str) -> None:
    weight = StoredWeight("linear", (8, 6))
    assert stored_bytes(weight, form, 2, itemsize=4) == 4 * stored_parameters(weight, form, 2)


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_the_numbers_of_a_pivoted_pair_never_exceed_the_dense_matrix(
    d_out: int, d_in: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    assert stored_parameters(StoredWeight("linear", (d_out, d_in)), "pivoted", rank) - 2 * d_out <= d_out * d_in


class TwoLayers(nn.Module):
    """A linear layer, and weights that their module multiplies with in code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(20, 24, batch_first=True), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0])


RANKS = {"rnn.weight_ih_l0": 3, "last": 4}


def planned(form: str) -> Plan:
    layers = tuple(LayerPlan(name, (0, 0), "", rank, form, 0, 0.0, "") for name, rank in RANKS.items())
    return Plan("", None, Budget("plan"), layers)


def low_rank_model() -> TwoLayers:
    torch.manual_seed(0)
    model = TwoLayers().eval()
    for weight, rank in ((model.rnn.weight_ih_l0, 3), (model.last.weight, 4)):
        weight.data = torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1]) / 5
    return model


def test_a_form_is_one_module_and_its_registration(registered: PairForm, tmp_path: Path) -> None:
    """Compressed by a plan file, written, loaded, compressed in memory, and restored, with nothing else changed."""
    model, x = low_rank_model(), torch.randn(2, 5, 20)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    (tmp_path / "plan.json").write_text(json.dumps(planned(registered.name).to_dict()))
    small = compress(
        tmp_path / "dense.pt", output=tmp_path / "small.safetensors", plan=tmp_path / "plan.json", factory=TwoLayers
    )
    layers = {layer.name: layer for layer in small.plan.layers}
    assert (layers["last"].form, layers["last"].parameters) == (registered.name, 4 * (24 + 16 + 1))
    assert max(layer.error for layer in small.plan.layers) < 1e-5
    loaded = load_model(tmp_path / "small.safetensors", TwoLayers)
    assert isinstance(loaded.last, DiagonalLinear)
    in_memory = compress(model, plan=planned(registered.name)).model
    assert in_memory is not None
    for each in (loaded, in_memory):
        torch.testing.assert_close(each(x), model(x), rtol=1e-4, atol=1e-5)

    restored = restore(tmp_path / "small.safetensors", output=tmp_path / "again.pt", factory=TwoLayers)
    twin = TwoLayers().eval()
    twin.load_state_dict(torch.load(restored.output, weights_only=True))
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_form_that_is_never_smaller_is_never_chosen(registered: PairForm) -> None:
    weight = StoredWeight("linear", (40, 30))
    assert registered in pair_forms(weight)
    chosen = compress(low_rank_model(), keep=0.5, prefer="size").plan.layers
    assert {layer.form for layer in chosen} <= {"dense", "plain", "pivoted"}


def test_a_form_that_is_not_registered_is_refused(tmp_path: Path) -> None:
    torch.save(low_rank_model().state_dict(), tmp_path / "dense.pt")
    with pytest.raises(BadInput, match="diagonal"):
        compress(
            tmp_path / "dense.pt", output=tmp_path / "small.safetensors", plan=planned("diagonal"), factory=TwoLayers
        )
