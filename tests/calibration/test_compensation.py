"""Refitted layers against ridge regression by other means, and against doing without, on toys and a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import compress
from compressor.calibration import (
    Calibration,
    CalibrationSettings,
    Compensated,
    compensate,
    holdout_loss,
    uncompensated,
)
from compressor.calibration.calibration import with_layers
from compressor.calibration.compensation import (
    _factored,
    _InputStatistics,
    _Outputs,
    _ridge_target,
    _Target,
)
from compressor.calibration.examples import Part
from compressor.calibration.truncation import only_compared
from compressor.factorize import FactorPair, Metric, decompose, spatial_pair
from compressor.forms import LowRankLinear, PivotedLinear
from compressor.network import with_separate_experts
from compressor.network.experts import Expert
from compressor.planning import LayerPlan
from tests.calibration.tiny_models import (
    CHAINS,
    TWO_PASSES,
    calibrated,
    eligible,
    inputs_for,
    left_as_it_was,
    odd,
    planned,
    transformer,
)


class Toy(nn.Module):
    """Two layers, the second of which is also given inputs that pass the first by."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 10, bias=bias), nn.Linear(14, 6, bias=bias)
        with torch.no_grad():
            self.first.weight.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cat([torch.relu(self.first(x[:, :8])), x[:, 8:]], 1))


def toy(
    *, bias: bool, silent: bool = False, rank: int = 3, settings: CalibrationSettings | None = None
) -> tuple[Calibration, list[LayerPlan]]:
    """A calibrated toy of which the first layer is to be of low rank, the second of full; `silent` inputs are zero."""
    torch.manual_seed(0)
    mixed = torch.randn(7, 12) / 7**0.5  # so that what passes by tells of what the first layer loses
    fit, holdout = ([torch.randn(200, 7) @ mixed + 0.5 for _ in range(3)] for _ in range(2))
    for x in (*fit, *holdout):
        x[:, 8:] *= 0 if silent else 1
    model = Toy(bias=bias).eval()
    batches = ([{"inputs": x} for x in part] for part in (fit, holdout))
    calibration = calibrated(model, *batches, settings=settings)
    first, second = eligible(model)
    assert (first.name, second.name) == ("first", "second")
    return calibration, [planned(first, rank), planned(second, 6)]


def dense_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Matrix and bias of a plain pair, in float64."""
    bias = module.up.bias
    return (module.up.weight.double() @ module.down.weight.double()).detach(), None if bias is None else bias.double()


@torch.no_grad()
def given(calibration: Calibration, solution: Compensated | None, place: str, *, part: Part = "fit") -> Tensor:
    """What a layer is given in the dense model or, with a solution, in the compressed one."""
    seen: list[Tensor] = []
    modules = {} if solution is None else solution.modules
    with with_layers(calibration.model, modules) as model:
        handle = model.get_submodule(place).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
        for chunk in calibration.data.chunks(part):
            model(*calibration.data.read(chunk).inputs.values())
        handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def test_a_first_layer_has_nothing_to_make_up_for() -> None:
    for bias in (False, True):
        calibration, (first, _) = toy(bias=bias, rank=8)
        matrix, _ = dense_of(compensate(calibration, [first]).modules["first"])
        torch.testing.assert_close(matrix, calibration.model.first.weight.double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("relative", [1e-4, 1e-1])
@pytest.mark.parametrize("bias", [False, True])
def test_the_refit_is_ridge_regression_toward_the_weights(bias: bool, relative: float) -> None:
    calibration, plans = toy(bias=bias, settings=CalibrationSettings(ridges=(relative,)))
    solution = compensate(calibration, plans)
    found, found_bias = dense_of(solution.modules["second"])
    x, y = given(calibration, None, "second"), given(calibration, solution, "second")
    weight = calibration.model.second.weight.detach().double()
    about_x, about_y = (x.mean(0), y.mean(0)) if bias else (0.0, 0.0)
    x, y = x - about_x, y - about_y
    ridge = relative * (y**2).sum(0).mean() / len(y)
    # Rows for the examples and, below, for the pull toward the weights.
    left = torch.cat([y / len(y) ** 0.5, ridge.sqrt() * torch.eye(14, dtype=torch.float64)])
    right = torch.cat([x @ weight.T / len(x) ** 0.5, ridge.sqrt() * weight.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    assert float((expected - weight).norm()) > 0.05 * float(weight.norm())
    # Sums in float32, and a system whose condition number the ridge bounds.
    rounding = 2e-6 + torch.finfo(torch.float32).eps / relative
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
    if bias:
        assert found_bias is not None
        shifted = calibration.model.second.bias.detach().double() + weight @ about_x - found @ about_y
        torch.testing.assert_close(found_bias, shifted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_what_calibration_never_excites_is_left_as_it_was(bias: bool) -> None:
    calibration, plans = toy(bias=bias, silent=True)
    weight = calibration.model.second.weight.detach().double()
    found, _ = dense_of(compensate(calibration, plans).modules["second"])
    silent, heard = slice(10, 14), slice(0, 10)
    assert float((found[:, heard] - weight[:, heard]).abs().max()) > 0.01
    torch.testing.assert_close(found[:, silent], weight[:, silent], rtol=0, atol=1e-6)


@torch.no_grad()
def holdout_error(calibration: Calibration, before: Compensated, place: str, *, module: nn.Module) -> float:
    """What the outputs of one layer lose on the holdout examples, in the metric of the gradients, by brute force."""
    x, y = (given(calibration, solution, place, part="holdout") for solution in (None, before))
    dense = calibration.model.get_submodule(place).double()
    change = dense(x) - module.double()(y)
    dense.float()
    module.float()
    return float(((change @ calibration.metrics[place].gradients) * change).sum(1).mean())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rank", "share"), [(2, 1.0), (4, 0.9)])
def test_a_refitted_layer_loses_less_on_holdout_examples_than_the_truncated_one(
    bias: bool, rank: int, share: float
) -> None:
    calibration, (first, second) = toy(bias=bias)
    plans = [first, planned(calibration.layers[second.name], rank)]
    solution, truncated = compensate(calibration, plans), uncompensated(calibration, plans)
    refitted = holdout_error(calibration, solution, "second", module=solution.modules["second"])
    without = holdout_error(calibration, solution, "second", module=truncated.modules["second"])
    assert refitted < share * without


def test_a_refit_that_does_not_help_on_holdout_examples_is_not_taken() -> None:
    # Fitted on next to nothing in one direction, and judged on much in all others.
    torch.manual_seed(0)
    direction = torch.randn(1, 12)
    fit = [{"inputs": torch.randn(4, 1) * direction + 1e-3 * torch.randn(4, 12)} for _ in range(2)]
    holdout = [{"inputs": 10 * torch.randn(400, 12)}]
    for bias in (False, True):
        model = Toy(bias=bias).eval()
        calibration = calibrated(model, fit, holdout)
        first, second = eligible(model)
        plans = [planned(first, 2), planned(second, 2)]
        solution, truncated = compensate(calibration, plans), uncompensated(calibration, plans)
        refitted = holdout_error(calibration, solution, "second", module=solution.modules["second"])
        assert refitted <= 1.0001 * holdout_error(calibration, solution, "second", module=truncated.modules["second"])


def test_with_a_bias_no_mean_is_moved() -> None:
    calibration, (first, second) = toy(bias=True)
    plans = [first, planned(calibration.layers[second.name], 2)]
    solution = compensate(calibration, plans)
    assert not torch.equal(
        solution.factors["second"]["second.down.weight"],
        uncompensated(calibration, plans).factors["second"]["second.down.weight"],
    )
    for place in ("first", "second"):
        dense = calibration.model.get_submodule(place)
        with torch.no_grad():
            before = dense(given(calibration, None, place).float()).mean(0)
            after = solution.modules[place](given(calibration, solution, place).float()).mean(0)
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_stays_dense_is_bit_for_bit_as_it_was() -> None:
    model = transformer("llama")
    data = [inputs_for("llama", 8) for _ in range(4)]
    report = compress(model, keep=0.5, calibration=data, calibration_settings=TWO_PASSES, prefer="size", bits=16)
    assert report.model is not None
    low_rank = {f"{layer.name}.weight" for layer in report.plan.layers if layer.rank is not None}
    before, after = model.state_dict(), report.model.state_dict()
    kept = [name for name in before if name not in low_rank]
    assert 0 < len(kept) < len(before)
    assert all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.slow
def test_the_model_is_restored_after_compensation_and_after_a_failure_in_it() -> None:
    model = transformer("llama")
    data = [inputs_for("llama", 8) for _ in range(4)]

    def stop(stage: str, *_: int) -> None:
        if stage == "compensate":
            raise KeyboardInterrupt

    with left_as_it_was(model):
        with pytest.raises(KeyboardInterrupt):
            compress(model, keep=0.5, calibration=data, effort="balanced", progress=stop, prefer="size", bits=16)
        compress(model, keep=0.5, calibration=data, effort="balanced", prefer="size", bits=16)


def moments_of(x: Tensor, y: Tensor) -> _InputStatistics:
    """The moments of a layer's inputs in two models, one input a row."""
    return _InputStatistics(x.T @ x / len(x), x.T @ y / len(x), y.T @ y / len(x), x.mean(0), y.mean(0))


@dataclass(frozen=True)
class Problem:
    """A layer with its metric, and few inputs to fit and many to judge: y lacks some of x, and there is noise."""

    start: _Target
    fit: _InputStatistics
    holdout: _InputStatistics
    rank: int

    def pair(self, target: _Target) -> FactorPair:
        matrix = target.matrix if target.start is None else target.matrix - target.start
        return decompose(matrix, target.metric).pair(matrix, self.rank, target.metric)

    def target(self, ridges: Sequence[float]) -> _Target | None:
        """What the layer is refitted to."""
        x, y = (None, None) if self.start.x is None else (self.fit.x, self.fit.y)
        about = replace(self.start, x=x, y=y)
        outputs = _Outputs.of(about, self.holdout)
        return _ridge_target(about, self.pair(self.start), self.fit.centered(x, y), outputs=outputs, ridges=ridges)

    def error(self, target: _Target) -> float:
        """The holdout error of a target truncated, by products of whole matrices."""
        product, inputs = self.pair(target).product(), self.holdout.centered(target.x, target.y)
        product = product if target.start is None else product + target.start
        matrix = self.start.matrix
        crossed = matrix @ inputs.xy @ product.T
        moved = matrix @ inputs.xx @ matrix.T - crossed - crossed.T + product @ inputs.yy @ product.T
        return float((self.start.metric.gradients * moved).sum())


def problem(d_out: int, d_in: int, *, samples: int, bias: bool, seed: int, initial: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    mix, lost = random(d_in, d_in) / d_in**0.5, random(d_in, d_in) / d_in**0.5
    mean, output = random(d_in) if bias else torch.zeros(d_in).double(), random(d_out, d_out) * 0.3
    both = []
    for count in (samples, 20 * samples):
        x = random(count, d_in) @ mix + mean
        both.append(moments_of(x, x - 0.3 * x @ lost + 0.1 * random(count, d_in)))
    fit, holdout = both
    gradients = torch.eye(d_out, dtype=torch.float64) + output @ output.T
    # No two of its singular values are so close that a ridge may exchange them, and with them what is truncated.
    left, right = (torch.linalg.qr(random(side, min(d_out, d_in))).Q for side in (d_out, d_in))
    matrix = left * 0.5 ** torch.arange(min(d_out, d_in)) @ right.T
    about, x = (fit.centered(fit.x, fit.x), fit.x) if bias else (fit, None)
    inputs = about.xx + 1e-3 * about.xx.diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    start = _Target(matrix, random(d_out) if bias else None, Metric(inputs, gradients, x), x, x)
    if initial:
        initial_weights = 0.1 * random(d_out, d_in)
        start = replace(start, matrix=matrix + initial_weights, start=initial_weights)
    return Problem(start, fit, holdout, rank=max(1, min(d_out, d_in) // 3))


@pytest.mark.slow
@pytest.mark.parametrize("initial", [False, True])
def test_the_ridge_chosen_is_as_good_as_the_best_of_all_decomposed(initial: bool) -> None:
    ridges, shares = CalibrationSettings().ridges, []
    for seed in range(100):
        d_out, d_in, samples = (int(each) for each in np.random.default_rng(seed).integers(5, (40, 40, 300)))
        one = problem(d_out, d_in, samples=samples, bias=seed % 2 == 0, seed=seed, initial=initial)

        def target(*tried: float, one: Problem = one) -> _Target:
            found = one.target(tried)
            assert found is not None
            return found

        alone = [one.error(target(ridge)) for ridge in ridges]
        shares.append((one.error(target(*ridges)) - min(alone)) / min(alone))
        assert max(alone) > 1.001 * min(alone), "which ridge it is matters"
    # What a decomposition truncates may jump with the ridge; without one it does not.
    assert sum(share > 0.01 for share in shares) <= 3
    assert max(shares) < 0.1


@settings(max_examples=40)
@drawn(
    d_out=st.integers(2, 12),
    d_in=st.integers(2, 12),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
    initial=st.booleans(),
)
def test_the_error_through_the_factors_is_that_of_the_whole_matrix(
    d_out: int, d_in: int, *, bias: bool, seed: int, initial: bool
) -> None:
    one = problem(d_out, d_in, samples=20, bias=bias, seed=seed, initial=initial)
    outputs = _Outputs.of(one.start, one.holdout)
    assert outputs.error(one.pair(one.start)) == pytest.approx(one.error(one.start), abs=1e-12 * outputs.dense)


def test_a_spatial_pair_is_compared_by_the_columns_of_its_matrix() -> None:
    torch.manual_seed(0)
    for shape in ((5, 4, 3, 3), (12, 3, 3, 2)):
        pair = spatial_pair(torch.randn(shape), 2)
        torch.testing.assert_close(_factored(pair).product(), pair.product())


def test_what_is_only_compared_computes_the_same_without_pivots() -> None:
    calibration, plans = toy(bias=True)
    plans = [replace(plans[0], form="pivoted"), replace(plans[1], rank=None, form="dense")]
    stored, compared = uncompensated(calibration, plans).modules, only_compared(calibration, plans)
    assert list(stored) == list(compared) == ["first"]
    assert isinstance(stored["first"], PivotedLinear)
    assert isinstance(compared["first"], LowRankLinear)
    x = torch.randn(5, 8)
    torch.testing.assert_close(compared["first"](x), stored["first"](x))


def test_a_layer_is_decomposed_once_for_all_ranks() -> None:
    calibration, _ = toy(bias=True)
    layer = calibration.layers["second"]
    assert not calibration.decompositions.has("second")
    first = uncompensated(calibration, [planned(layer, 2)])
    made = calibration.decompositions.get("second")
    assert made.basis.dtype == torch.float32
    uncompensated(calibration, [planned(layer, 3)])
    # What is found there is used, whatever it is.
    calibration.decompositions.put("second", replace(made, basis=made.basis.flip(1)))
    other = uncompensated(calibration, [planned(layer, 2)])
    assert not torch.equal(first.factors["second"]["second.up.weight"], other.factors["second"]["second.up.weight"])


class Routed(nn.Module):
    """Two experts, each given the examples that a router sends it: other ones once the layer before is truncated."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.route, self.leave = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        chosen, outputs = self.route(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                outputs[chosen == index] = expert(x[chosen == index])
        return self.leave(torch.relu(outputs))


def test_experts_that_are_given_other_examples_are_truncated_as_they_are() -> None:
    torch.manual_seed(0)
    model = Routed().eval()
    with torch.no_grad():
        model.route.bias.copy_(-model.route(torch.relu(model.enter(torch.randn(40, 8)))).mean(0))
    calibration = calibrated(model, [{"inputs": torch.randn(40, 8)} for _ in range(3)])
    plans = [planned(layer, 2) for layer in calibration.layers.values() if layer.name != "route"]
    solution, truncated = compensate(calibration, plans), uncompensated(calibration, plans)
    experts = [given(calibration, each, "experts.0").shape for each in (None, solution)]
    assert experts[0] != experts[1]
    for name in ("experts.0", "experts.1"):
        one, other = (each.factors[name] for each in (solution, truncated))
        assert all(torch.equal(one[key], other[key]) for key in other)


class Prefixed(nn.Module):
    """Blocks behind a projection, which runs again with every segment."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.project(x))


def test_what_stands_before_the_chain_is_refitted_once_and_first() -> None:
    torch.manual_seed(0)
    calibration = calibrated(Prefixed().eval(), [{"inputs": torch.randn(40, 6)} for _ in range(3)])
    assert calibration.segments.count == 4
    plans = [planned(layer, 2) for layer in calibration.layers.values()]
    solution = compensate(calibration, plans)
    alone = compensate(calibration, [each for each in plans if each.name == "project"])
    for key, tensor in alone.factors["project"].items():
        assert torch.equal(solution.factors["project"][key], tensor)


def test_a_layer_without_a_metric_is_truncated_by_itself() -> None:
    class Ignored(nn.Module):
        """A layer whose result counts for nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.heard, self.unheard = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.heard(x) + 0 * self.unheard(x)

    calibration = calibrated(Ignored().eval(), [{"inputs": torch.randn(40, 8)} for _ in range(3)])
    plans = [planned(layer, 2) for layer in calibration.layers.values()]
    pair = compensate(calibration, plans).modules["unheard"]
    left, values, right = torch.linalg.svd(calibration.model.unheard.weight.detach().double())
    best = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(dense_of(pair)[0], best, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "opt", "bert", "vit", "t5", "clip", "swin"])
def test_a_whole_model_refitted_segment_by_segment_is_the_one_refitted_at_once(
    name: str,
) -> None:
    if name in CHAINS:
        model = transformer(name).eval()
        fit, holdout = ([inputs_for(name, 12) for _ in range(2)] for _ in range(2))
    else:
        (model, inputs), more = odd(name), (odd(name, seed)[1] for seed in (1, 2, 3))
        fit, holdout = [inputs, next(more)], list(more)
        model.eval()
    cut = calibrated(model, fit, holdout)
    assert cut.segments.count > 1
    plans = [planned(layer, max(1, min(layer.shape) // 2)) for layer in cut.layers.values()]
    one = compensate(cut, plans)
    whole = calibrated(model, fit, holdout, settings=CalibrationSettings(by_segment=False))
    other = compensate(whole, plans)
    assert holdout_loss(cut, one.modules) == pytest.approx(holdout_loss(whole, other.modules), rel=0.02)


def mixture(experts: int) -> nn.Module:
    """A Mixtral of two blocks with separate experts."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    return with_separate_experts(transformers.MixtralForCausalLM(config)).eval()


def compensated_mixture(experts: int, settings: CalibrationSettings) -> tuple[int, Compensated]:
    """How often experts run while their layers are compensated, and the result."""
    model = mixture(experts)
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(40, (4, 16), generator=generator)} for _ in range(2)]
    calibration = calibrated(model, batches, settings=settings)
    plans = [planned(layer, 3) for layer in calibration.layers.values() if "experts" in layer.name]
    assert len(plans) > 2 * 3 * experts - 6  # all but those of experts that nothing is routed to
    runs: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, Expert):
            module.register_forward_pre_hook(lambda expert, _: runs.append(expert))
    found = compensate(calibration, plans)
    return len(runs), found


@pytest.mark.slow
def test_experts_cost_time_in_proportion_to_their_number() -> None:
    settings = CalibrationSettings()
    few, several, many = (compensated_mixture(experts, settings)[0] for experts in (4, 8, 16))
    assert several <= 2.2 * few
    assert many <= 2.2 * several


@pytest.mark.slow
def test_and_are_refitted_as_one_after_the_other() -> None:
    fewer, found = compensated_mixture(4, CalibrationSettings())
    more, expected = compensated_mixture(4, CalibrationSettings(statistics_bytes=1))
    assert fewer < more / 2
    for name, tensors in found.factors.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected.factors[name][key], rtol=0, atol=0)
