"""Layers in an initial form: what training wrote against a decomposition by LAPACK, refitted, fitted, and allocated."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.calibration import (
    Calibration,
    CalibrationData,
    CalibrationSettings,
    Compensated,
    calibrate,
    compensate,
    holdout_loss,
    refine,
    split_examples,
    uncompensated,
)
from compressor.calibration.candidates import Search
from compressor.calibration.weighted_layers import weighted_layers
from compressor.choices import Effort
from compressor.data import open_data
from compressor.data.builtin_data import digits
from compressor.engine import Run
from compressor.factorize import Metric
from compressor.forms import FORMS, TRANSPOSED, InitialLayer
from compressor.initial import InitialWeights, Start, starts_of
from compressor.io import open_checkpoint
from compressor.lowrank import as_matrix, stored_matrix
from compressor.measure import Spectrum
from compressor.model import open_model
from compressor.network import Layer
from compressor.planning import Budget, LayerPlan, MeasuredLayer, choose_ranks
from tests.calibration.tiny_models import (
    CPU,
    TWO_PASSES,
    batch_of,
    calibrated,
    eligible,
    inputs_for,
    left_as_it_was,
    planned,
    transformer,
)


@dataclass(frozen=True)
class Trained:
    """A network trained briefly from a known start, with its calibration."""

    calibration: Calibration
    initial: Mapping[str, Tensor]

    def written(self, layer: Layer, share: float) -> tuple[Tensor, Tensor]:
        """The matrix of a layer in float64, and what is left of it without the start."""
        name = f"{layer.module}.weight"
        weight = self.calibration.model.get_submodule(layer.module).weight.detach().double()
        matrix, start = as_matrix(layer, weight), as_matrix(layer, self.initial[name].double())
        return matrix, matrix - share * start


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip


def trained_from(seed: int) -> Trained:
    """After two epochs of AdamW with strong decay, from a share of .9 or so."""
    torch.manual_seed(seed)
    model = build()
    initial = {name: each.clone() for name, each in model.state_dict().items()}
    images, labels = digits("train")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.5)
    for _ in range(2):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    data = open_data(list(zip(images[:512].split(32), labels[:512].split(32), strict=True)))
    layers = eligible(model.eval())
    calibration = calibrate(model, layers, split_examples(data), run=Run(CPU))
    return Trained(replace(calibration, initial=InitialWeights.from_state(initial)), initial)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return trained_from(0)


def plan_for(layer: Layer, rank: int, form: str, *, share: float = 0.9) -> LayerPlan:
    return replace(planned(layer, rank), form=form, share=share)


def roots(metric: object) -> tuple[np.ndarray, np.ndarray]:
    """`L` with `L L^T` the moment of the gradients and of the inputs, by LAPACK."""
    assert isinstance(metric, Metric)
    return np.linalg.cholesky(metric.gradients.numpy()), np.linalg.cholesky(metric.inputs.numpy())


def in_metric(matrix: Tensor, metric: object) -> np.ndarray:
    gradients, inputs = roots(metric)
    return gradients.T @ matrix.double().numpy() @ inputs


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("form", ["plain", "pivoted", "channel"])
def test_what_training_wrote_is_truncated_optimally_in_the_metric(trained: Trained, form: str, rank: int) -> None:
    calibration, tried = trained.calibration, 0
    for layer in calibration.layers.values():
        if not FORMS[f"initial+{form}"].takes(layer):
            continue
        plan = plan_for(layer, rank, f"initial+{form}")
        tensors = uncompensated(calibration, [plan]).factors[layer.name]
        matrix, written = trained.written(layer, plan.share)
        left = matrix - stored_matrix(layer, plan, tensors, start=matrix - written)
        metric = calibration.metrics[layer.name]
        values = np.linalg.svd(in_metric(written, metric), compute_uv=False)
        best = np.sqrt((values[rank:] ** 2).sum())
        found = np.linalg.norm(in_metric(left, metric))
        assert found == pytest.approx(best, rel=1e-4)
        tried += 1
    assert tried


def measured(trained: Trained, start: Start) -> list[MeasuredLayer]:
    """The layers as they are measured without data, with a start."""
    found = []
    for layer in trained.calibration.layers.values():
        matrix, written = trained.written(layer, start.share)
        kernel = written.reshape(layer.tensor_shape)
        forms = [form for form in FORMS.values() if form.takes(layer) and form.has_own_errors]
        own = {form.name: form.own_values(kernel if form.from_initial else matrix.view_as(kernel)) for form in forms}
        values = np.linalg.svd(matrix.numpy(), compute_uv=False)
        found.append(MeasuredLayer(layer, values, itemsize=4, own_values=own, start=start))
    return found


START = Start(correlation=0.9, z=100.0, predicted=0.9, fitted=0.91, share=0.9, written=0.4, rank_bound=None)


def test_the_errors_of_what_training_wrote_are_relative_to_the_whole_layer(trained: Trained) -> None:
    calibration = trained.calibration
    for m in weighted_layers(measured(trained, START), calibration):
        assert m.start is not None
        matrix, written = trained.written(m.layer, m.start.share)
        metric = calibration.metrics[m.layer.name]
        size = np.linalg.norm(in_metric(matrix, metric))
        values = np.linalg.svd(in_metric(written, metric), compute_uv=False)
        expected = np.sqrt(np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0)) / size
        for form in ("initial+plain", "initial+pivoted", "initial+channel"):
            if form in m.own_values:
                np.testing.assert_allclose(m.own_errors[form], expected, rtol=1e-6, atol=1e-6)
        # Of a spatial pair the errors are those of what is found at a rank.
        if "initial+spatial" in m.own_values:
            plan = plan_for(m.layer, 2, "initial+spatial", share=m.start.share)
            tensors = uncompensated(calibration, [plan]).factors[m.layer.name]
            left = matrix - stored_matrix(m.layer, plan, tensors, start=matrix - written)
            found = np.linalg.norm(in_metric(left, metric)) / size
            assert found == pytest.approx(m.own_errors["initial+spatial"][2], rel=1e-3)
            assert m.own_errors["initial+spatial"][0] == pytest.approx(expected[0])


def test_the_share_is_the_recipes_or_else_the_fit_in_the_metric_beside_what_training_wrote(trained: Trained) -> None:
    calibration = trained.calibration
    for predicted in (0.9, 0.5, None):  # the second says what is not so, and is not used
        for m in weighted_layers(measured(trained, replace(START, predicted=predicted)), calibration):
            (matrix, rest), (_, written) = (trained.written(m.layer, share) for share in (1.0, 0.9))
            metric = calibration.metrics[m.layer.name]
            whole, initial, wrote = (in_metric(each, metric) for each in (matrix, matrix - rest, written))
            left, _, right = np.linalg.svd(wrote)
            half = min(whole.shape) // 2
            a, b = ((left[:, half:].T @ each @ right[half:].T).flatten() for each in (initial, whole))
            [fitted], *_ = np.linalg.lstsq(a[:, None], b, rcond=None)
            assert m.start is not None
            assert m.start.fitted == pytest.approx(fitted, rel=1e-5)
            assert m.start.share == (0.9 if predicted == 0.9 else m.start.fitted)


def test_the_fit_finds_what_weight_decay_left(trained: Trained) -> None:
    """AdamW multiplied by `1 - lr wd` in each of 90 steps, and training wrote more than half of the norm."""
    left = (1 - 2e-3 * 0.5) ** 90
    for m in weighted_layers(measured(trained, replace(START, predicted=None)), trained.calibration):
        assert m.start is not None
        # What training wrote leaves more free in a larger matrix.
        assert m.start.share == pytest.approx(left, rel=0.05 if min(m.layer.shape) >= 48 else 0.4)


def plans_at(trained: Trained, *, seed_alone: bool) -> list[LayerPlan]:
    """Every layer in an initial form, and each form once; the first layer with nothing but its start if asked for."""
    layers = list(trained.calibration.layers.values())
    forms = ("initial+channel", "initial+spatial", "initial+plain", "initial+pivoted")
    ranks = [0 if seed_alone and layer is layers[0] else min(layer.shape) // 8 for layer in layers]
    return [plan_for(layer, rank, form) for layer, rank, form in zip(layers, ranks, forms, strict=True)]


def require_stored_is_measured(trained: Trained, solution: Compensated, plans: list[LayerPlan]) -> None:
    """Each module runs with the start and what is stored."""
    for plan in plans:
        layer, tensors = trained.calibration.layers[plan.name], solution.factors[plan.name]
        matrix, written = trained.written(layer, 0.9)
        stored = stored_matrix(layer, plan, tensors, start=matrix - written)
        module = solution.modules[layer.module]
        assert isinstance(module, InitialLayer)
        torch.testing.assert_close(as_matrix(layer, module.formed_weight()).double(), stored, rtol=1e-5, atol=1e-6)
        assert {f"{layer.name}.{key}" for key in module.state_dict()} == tensors.keys()
        assert all(torch.equal(tensors[f"{layer.name}.{key}"], each) for key, each in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("seed_alone", [False, True])
def test_layers_in_initial_forms_are_refitted_and_then_fitted(trained: Trained, seed_alone: bool) -> None:
    calibration, plans = trained.calibration, plans_at(trained, seed_alone=seed_alone)
    with left_as_it_was(calibration.model):
        truncated = uncompensated(calibration, plans)
        compensated = compensate(calibration, plans)
        refined = refine(calibration, compensated)
    losses = [holdout_loss(calibration, each.modules) for each in (truncated, compensated, refined)]
    assert losses[2] < losses[1] < losses[0]
    for each in (truncated, compensated, refined):
        require_stored_is_measured(trained, each, plans)
    assert (refined.factors["0"].keys() == {"0.weight", "0.bias"}) == seed_alone


def near(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """An initial state that a model may have been trained from."""
    torch.manual_seed(4)
    return {name: (each + 0.1 * torch.randn(each.shape)).to(dtype) for name, each in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_holdout_loss_is_that_of_the_dense_layers_that_are_formed(dtype: torch.dtype) -> None:
    """Also of an embedding with a tied head, and of weights that are stored transposed."""
    model = transformer("gpt2").eval().to(dtype)
    parts = [[inputs_for("gpt2", 12) for _ in range(3)] for _ in range(2)]
    found = calibrated(model, *parts, embeddings=True, settings=TWO_PASSES)
    calibration = replace(found, initial=InitialWeights.from_state(near(model, dtype)))
    layers = calibration.layers.values()
    assert any(layer.head for layer in layers)
    plans = [plan_for(layer, min(layer.shape) // 4, "initial+plain") for layer in layers]
    solution = uncompensated(calibration, plans)
    formed = deepcopy(model)
    for plan in plans:
        layer, tensors = calibration.layers[plan.name], solution.factors[plan.name]
        matrix = stored_matrix(layer, plan, tensors, start=calibration.start(layer, plan.share))
        module = formed.get_submodule(layer.module)
        stored = matrix.T if layer.kind in TRANSPOSED else matrix
        module.weight.data = stored.reshape(module.weight.shape).to(dtype)
        if layer.bias is not None:
            module.bias.data = tensors[layer.bias]
    formed.tie_weights()
    loss = holdout_loss(calibration, solution.modules)
    # Where a sum in float32 rounds to another number of the dtype, nearly nothing changes.
    assert loss == pytest.approx(holdout_loss(calibration, whole(formed)), rel=1e-3)


def whole(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model that have parameters of their own, by their places."""
    return {name: each for name, each in model.named_modules() if name and each._parameters}


@pytest.mark.slow
def test_a_model_that_is_read_from_files_gets_the_same_factors(tmp_path: Path) -> None:
    transformer("llama").save_pretrained(tmp_path)
    state = near(transformer("llama"))
    torch.manual_seed(1)
    parts = [tuple(batch_of(inputs_for("llama", 12)) for _ in range(3)) for _ in range(2)]
    found = []
    for streamed in (False, True):
        subject = open_model(tmp_path)
        layers = [layer for layer in subject.layers if layer.eligible]
        model = subject.streamed if streamed else subject.module
        data = CalibrationData(*parts, labeled=False)
        calibration = calibrate(model.eval(), layers, data, run=Run(CPU), settings=TWO_PASSES)
        calibration = replace(calibration, initial=InitialWeights.from_state(state))
        plans = [plan_for(layer, min(layer.shape) // 4, "initial+plain") for layer in layers]
        found.append(refine(calibration, compensate(calibration, plans)).factors)
    one, other = found
    assert one.keys() == other.keys()
    for name, factors in one.items():
        assert all(torch.equal(each, other[name][key]) for key, each in factors.items())


def test_a_start_is_in_memory_as_long_as_its_layer(trained: Trained) -> None:
    modules = uncompensated(trained.calibration, plans_at(trained, seed_alone=False)).modules
    layer = modules["5"]
    assert isinstance(layer, InitialLayer)
    start = weakref.ref(layer.start)
    assert modules["5"] is layer
    del layer
    assert start() is None


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "most"), [(0.5, 1.0), (0.2, 0.7), (0.1, 0.7)])
def test_with_the_start_a_network_loses_less_at_equal_size(trained: Trained, keep: float, most: float) -> None:
    calibration, with_start = trained.calibration, measured(trained, START)
    without = [replace(m, start=None, own_values=of_matrix(m)) for m in with_start]
    losses = []
    for layers in (without, with_start):
        search = Search(calibration, weighted_layers(layers, calibration), allocate, calibration.settings.exponents)
        found = search.find(Budget("keep", keep))
        assert sum(each.parameters for each in found.layers) <= keep * sum(m.layer.parameters for m in layers)
        assert all((each.share is not None) == each.form.startswith("initial") for each in found.layers)
        losses.append(found.loss)
    assert losses[1] <= most * losses[0]


@pytest.mark.parametrize("worse", [True, False])
@pytest.mark.parametrize("effort", ["fast", "best"])
def test_starts_are_left_where_the_holdout_loses_less_without(trained: Trained, effort: Effort, *, worse: bool) -> None:
    def judge(_: object, modules: Mapping[str, nn.Module]) -> float:
        return float(any(isinstance(each, InitialLayer) for each in modules.values()) == worse)

    calibration = replace(trained.calibration, settings=CalibrationSettings.of(effort))
    weighted = weighted_layers(measured(trained, START), calibration)
    search = Search(calibration, weighted, allocate, calibration.settings.exponents, judge=judge)
    found = search.find(Budget("keep", 0.2))
    assert any(each.form.startswith("initial") for each in found.layers) != worse


def allocate(layers: Sequence[MeasuredLayer], budget: Budget, exponent: float) -> tuple[LayerPlan, ...]:
    return choose_ranks(layers, budget, "auto", file_bytes=lambda _: 0, exponent=exponent)


@pytest.mark.slow
def test_a_wrong_seed_changes_nothing(trained: Trained) -> None:
    right, wrong = (InitialWeights.from_seed(build, seed) for seed in (0, 1))
    model, layers = trained.calibration.model, list(trained.calibration.layers.values())
    assert starts_of(layers, open_checkpoint(model), right).keys() == {layer.name for layer in layers}
    starts = starts_of(layers, open_checkpoint(model), wrong)
    factors = []
    for initial in (None, wrong):
        calibration = replace(trained.calibration, initial=initial)
        own = [replace(m, start=starts.get(m.layer.name), own_values=of_matrix(m)) for m in measured(trained, START)]
        search = Search(calibration, weighted_layers(own, calibration), allocate, calibration.settings.exponents)
        factors.append(search.find(Budget("keep", 0.2)).solved.factors)
    one, other = factors
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert all(torch.equal(each, other[name][key]) for key, each in tensors.items())


def of_matrix(m: MeasuredLayer) -> dict[str, Spectrum]:
    """The values of the forms of a layer without a start."""
    return {form: values for form, values in m.own_values.items() if not FORMS[form].from_initial}
