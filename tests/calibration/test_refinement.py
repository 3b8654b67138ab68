"""The factors of a block fitted to what the dense block puts out: kept only where that lowers the holdout error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import BadInput, Compression, compress
from compressor.calibration import (
    Calibration,
    CalibrationSettings,
    Compensated,
    RefinementSettings,
    holdout_loss,
    refine,
    uncompensated,
)
from compressor.calibration.calibration import with_layers
from compressor.calibration.criterion import outputs_of
from compressor.calibration.refinement import adam, fit_to_dense
from compressor.data.builtin_data import digits
from compressor.measure.moments import kept_rows
from compressor.report.wording import calibration_words
from tests.calibration.tiny_models import (
    CHAINS,
    ODD,
    TWO_PASSES,
    calibrated,
    inputs_for,
    left_as_it_was,
    odd,
    planned,
    trained_on_digits,
    transformer,
)

ADAM: dict[str, Any] = {"seed": 0, "settings": RefinementSettings()}


def low_rank() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 3, bias=False), nn.Linear(3, 8, bias=False))


def of_examples(dense: nn.Module, fitted: nn.Module, examples: Tensor) -> Tensor:
    return (fitted(examples) - dense(examples).detach()).square().sum(1).mean()


def test_the_fit_comes_near_the_best_matrix_of_the_rank() -> None:
    """From the truncated SVD, which is not the best one for inputs that differ in size."""
    torch.manual_seed(0)
    dense, pair = nn.Linear(12, 8, bias=False), low_rank()
    scales = torch.logspace(0.5, -0.5, 12)[torch.randperm(12)]
    x, held = torch.randn(512, 12) * scales, torch.randn(4096, 12) * scales
    u, s, vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    pair[0].weight.data, pair[1].weight.data = vh[:3].clone(), u[:, :3] * s[:3]
    losses = [partial(of_examples, dense, pair, part) for part in x.split(32)]

    def error() -> float:
        return float(of_examples(dense, pair, held).detach())

    before = error()
    assert fit_to_dense({"pair": pair}, losses, error, seed=0, settings=RefinementSettings(passes=24))
    # The weighted truncated SVD, in closed form.
    least = float(torch.linalg.svdvals(dense.weight.detach() * scales)[3:].square().sum())
    assert error() - least < 0.1 * (before - least)


def test_scales_move_at_a_rate_of_their_own_and_roundings_by_their_reach() -> None:
    settings = RefinementSettings(learning_rate=0.1, scales_learning_rate=0.02, rounding_reach=0.8)
    sizes = [torch.full((3,), 2.0) for _ in range(3)]
    rates = [group["lr"] for group in adam(sizes, 0.05, settings, scales={1}, signed={2}, steps=4).param_groups]
    assert rates == pytest.approx([0.05 * 2, 0.01 * 2, 2 * 0.8 / 4 / 2])


@pytest.mark.parametrize("helps", [0, 1, 3])
def test_the_factors_are_those_of_the_least_holdout_error(helps: int) -> None:
    """An error that rises from some pass on gives the factors of the pass before, bit for bit."""
    torch.manual_seed(0)
    dense, pair = nn.Linear(12, 8, bias=False), low_rank()
    x = torch.randn(64, 12)
    seen: list[list[Tensor]] = []

    def error() -> float:
        seen.append([parameter.detach().clone() for parameter in pair.parameters()])
        return float(20 - len(seen) if len(seen) <= helps + 1 else 20 + len(seen))

    losses = [partial(of_examples, dense, pair, x)]
    assert fit_to_dense({"pair": pair}, losses, error, **ADAM) == (helps > 0)
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), seen[helps], strict=True))
    assert not torch.equal(seen[helps + 1][0], seen[helps][0])
    assert all(parameter.grad is None for parameter in pair.parameters())


def test_an_error_that_is_not_finite_leaves_the_factors() -> None:
    torch.manual_seed(0)
    pair = low_rank()
    before = [parameter.detach().clone() for parameter in pair.parameters()]

    losses = [lambda: pair(torch.full((2, 12), 1e30)).square().sum()]
    assert not fit_to_dense({"pair": pair}, losses, lambda: float("nan"), **ADAM)
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), before, strict=True))


def test_a_loss_that_nothing_has_an_effect_on_leaves_the_factors() -> None:
    pair = low_rank()
    before = [parameter.detach().clone() for parameter in pair.parameters()]
    assert not fit_to_dense({"pair": pair}, [lambda: torch.zeros(())], lambda: 1.0, **ADAM)
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), before, strict=True))


def test_of_layers_of_which_nothing_is_stored_nothing_is_fitted() -> None:
    assert not fit_to_dense({"relu": nn.ReLU()}, [lambda: torch.ones(())], lambda: 1.0, **ADAM)


def started(
    name: str, *, padded: bool = False, settings: CalibrationSettings = TWO_PASSES
) -> tuple[Calibration, Compensated]:
    """A calibrated transformer or odd model, and its layers truncated."""
    if name in CHAINS:
        model = transformer(name).eval()
        parts = [[inputs_for(name, 12, padded=padded) for _ in range(3)] for _ in range(2)]
    else:
        model, inputs = odd(name)
        model = model.eval()
        parts = [[{key: each[torch.randperm(5)] for key, each in inputs.items()} for _ in range(3)] for _ in range(2)]
    calibration = calibrated(model, *parts, settings=settings)
    plans = [planned(layer, max(1, min(layer.shape) // 2)) for layer in calibration.layers.values()]
    return calibration, uncompensated(calibration, plans)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHAINS, *(name for name in ODD if name not in ("bart", "whisper"))])  # as T5
def test_all_kinds_of_models_are_fitted_and_left_as_they_were(name: str) -> None:
    calibration, start = started(name)
    before = {key: each.clone() for factors in start.factors.values() for key, each in factors.items()}
    with left_as_it_was(calibration.model):
        one = refine(calibration, start)
    assert all(torch.equal(each, before[key]) for factors in start.factors.values() for key, each in factors.items())
    assert one.modules.keys() == start.modules.keys()
    changed = 0
    for layer, factors in one.factors.items():
        assert factors.keys() == start.factors[layer].keys()
        for key, tensor in factors.items():
            changed += not torch.equal(tensor, before[key])
            # Which is not fitted, and stands in a module of another name.
            if calibration.layers[layer].kind == "parameter":
                continue
            # What will be written is what was measured.
            assert torch.equal(
                tensor, one.modules[calibration.layers[layer].module].state_dict()[key[len(layer) + 1 :]]
            )
    assert changed
    if calibration.segments.count == 1:
        assert holdout_loss(calibration, one.modules) < holdout_loss(calibration, start.modules)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "vit", "in place", "t5"])
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    calibration, start = started(name)
    one, other = (refine(calibration, start).factors for _ in range(2))
    assert one.keys() == other.keys()
    for layer, factors in one.items():
        assert all(torch.equal(tensor, other[layer][key]) for key, tensor in factors.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "vit", "in place", "t5", "bart", "clip", "swin"])
def test_every_layer_is_fitted_once(name: str) -> None:
    calibration, start = started(name)
    assert calibration.segments.count > 1
    fitted: list[str] = []

    def note(modules: Mapping[str, nn.Module], *_: object, **__: object) -> bool:
        fitted.extend(modules)
        return False

    result = refine(calibration, start, fit=note)
    assert sorted(fitted) == sorted(calibration.layers[layer].module for layer in start.factors)
    for layer, factors in start.factors.items():
        assert all(torch.equal(each, factors[key]) for key, each in result.factors[layer].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "clip"])
def test_the_last_block_of_a_chain_is_fitted_to_what_it_gives_to_all_that_follows(name: str) -> None:
    """What the next chain's first block is given does not depend on it."""
    calibration, _ = started(name, settings=CalibrationSettings())
    block = calibration.segments.chains[0].blocks[-1]
    inside = [layer for key, layer in calibration.layers.items() if key.startswith(f"{block}.")]
    start = uncompensated(calibration, [planned(layer, max(1, min(layer.shape) // 2)) for layer in inside])
    result = refine(calibration, start)
    metric = calibration.cache.boundary(len(calibration.segments.chains[0].blocks))[1].float()
    before, after = (given_away(calibration, block, each, metric=metric) for each in (start, result))
    assert 0 < after < 0.9 * before
    # Of the images CLIP reads one position alone, and the metric counts all of them alike.
    if name != "clip":
        assert holdout_loss(calibration, result.modules) < holdout_loss(calibration, start.modules)


@torch.no_grad()
def given_away(calibration: Calibration, block: str, solution: Compensated, *, metric: Tensor) -> float:
    """The change of a block's outputs on the holdout, in a metric, where the whole compressed model runs."""
    total = 0.0
    for batch in calibration.data.holdout:
        outputs: list[Tensor] = []
        note = partial(note_output, outputs)
        for modules in ({}, solution.modules):
            with (
                with_layers(calibration.model, modules) as model,
                model.get_submodule(block).register_forward_hook(note),
            ):
                outputs_of(model, batch.inputs)
        change = kept_rows(outputs[1] - outputs[0], batch.masks)
        total += float((change @ metric * change).sum())
    return total


def note_output(outputs: list[Tensor], _: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
    outputs.append(output if isinstance(output, Tensor) else output[0])


class Graph(nn.Module):
    """Nodes as rows, which are no examples: each is mixed with the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        return self.second(torch.relu(adjacency @ self.first(nodes)))


class Recurrent(nn.Module):
    """An LSTM that starts from a state for a batch of one size."""

    start: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 4)
        self.register_buffer("start", torch.randn(1, size, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x, (self.start, self.start))[0])


class SequenceFirst(nn.Module):
    """Positions before examples: every position is the mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).cumsum(0) / torch.arange(1, len(x) + 1)[:, None, None]
        return self.second(torch.relu(hidden))


class ChangesInPlace(nn.Module):
    """Adds to what a layer was given, which that layer's gradient would need."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = torch.tanh(self.middle(x))
        x += y
        return self.last(x)


def rows_that_are_no_examples(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    if name == "graph":
        return Graph(), [
            {"nodes": torch.randn(20, 6), "adjacency": torch.eye(20) + torch.rand(20, 20) / 20} for _ in range(6)
        ]
    if name == "recurrent":
        return Recurrent(20), [{"x": torch.randn(20, 5, 6)} for _ in range(6)]
    return SequenceFirst(), [{"x": torch.randn(20, 3, 6)} for _ in range(6)]


@pytest.mark.parametrize("name", ["graph", "recurrent", "sequence first"])
def test_rows_that_are_no_examples_stay_together(name: str) -> None:
    model, batches = rows_that_are_no_examples(name)
    sizes: list[int] = []

    def note(_: object, losses: Sequence[Any], *__: object, **___: object) -> bool:
        sizes.append(len(losses))
        return False

    calibration = calibrated(model.eval(), batches[:4], batches[4:])
    plans = [planned(each, 2) for each in calibration.layers.values() if each.kind == "linear"]
    start = uncompensated(calibration, plans)
    assert holdout_loss(calibration, refine(calibration, start).modules) < holdout_loss(calibration, start.modules)
    refine(calibration, start, fit=note)
    assert sizes == [4]


@pytest.mark.parametrize(("examples", "steps"), [(1, [3]), (12, [18]), (40, [18])])
def test_a_pass_has_sixteen_steps_or_as_many_as_there_are_examples(examples: int, steps: list[int]) -> None:
    """The parts of three batches are the whole of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).eval()
    calibration = calibrated(model, [{"inputs": torch.randn(examples, 6)} for _ in range(3)])
    start = uncompensated(calibration, [planned(each, 2) for each in calibration.layers.values()])
    found: list[int] = []

    def note(_: object, losses: Sequence[Callable[[], Tensor]], error: Callable[[], float], **__: object) -> bool:
        found.append(len(losses))
        chunks = [loss.args[0] for loss in losses if isinstance(loss, partial)]
        sizes = [calibration.data.read(chunk).examples for chunk in chunks]
        assert sum(sizes) == 3 * examples
        whole = sum(size * float(loss()) for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)
        assert whole == pytest.approx(error(), rel=1e-5)
        return False

    refine(calibration, start, fit=note)
    assert found == steps


def test_a_segment_that_cannot_be_differentiated_keeps_its_factors(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = ChangesInPlace().eval()
    data = [torch.randn(16, 6) for _ in range(8)]
    both = (CalibrationSettings(refine=refine) for refine in (True, False))
    result, without = (
        compress(model, keep=0.5, calibration=data, calibration_settings=settings, prefer="size", bits=16)
        for settings in both
    )
    assert "not fitted" in caplog.text
    assert same(result, without)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**20])  # powers of two, so that nothing is rounded otherwise
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    torch.manual_seed(0)
    dense, pair = nn.Linear(12, 8, bias=False), low_rank()
    other = deepcopy(pair)
    x = torch.randn(128, 12)
    for each, unit in ((pair, 1.0), (other, scale)):
        losses = [partial(scaled, dense, each, part, unit=unit) for part in x.split(16)]
        assert fit_to_dense(
            {"pair": each}, losses, lambda e=each, u=unit: float(scaled(dense, e, x, unit=u).detach()), **ADAM
        )
    for a, b in zip(pair.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def scaled(dense: nn.Module, fitted: nn.Module, examples: Tensor, *, unit: float) -> Tensor:
    return of_examples(dense, fitted, examples) * unit


@pytest.mark.slow
def test_texts_of_padding_alone_leave_the_factors_finite() -> None:
    calibration, start = started("llama", padded=True)  # from the ninth on nothing but padding
    assert not calibration.data.fit[0].inputs["attention_mask"][8:].any()
    result = refine(calibration, start)
    assert all(tensor.isfinite().all() for factors in result.factors.values() for tensor in factors.values())
    assert holdout_loss(calibration, result.modules) < holdout_loss(calibration, start.modules)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10))
    return trained_on_digits(model)


def compressed(model: nn.Module, keep: float, *, refine: bool = True) -> Compression:
    images, labels = digits("train")
    data = list(zip(images[:256].split(32), labels[:256].split(32), strict=True))
    settings = CalibrationSettings(refine=refine)
    return compress(
        model,
        keep=keep,
        calibration=data,
        calibration_samples=256,
        calibration_settings=settings,
        prefer="size",
        bits=16,
    )


def same(a: Compression, b: Compression) -> bool:
    assert a.model is not None
    assert b.model is not None
    mine, other = a.model.state_dict(), b.model.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_a_fit_is_taken_only_where_it_loses_less_on_the_holdout(trained: nn.Module, keep: float) -> None:
    with_fit, without = (compressed(trained, keep, refine=refine) for refine in (True, False))
    fitted, unfitted = (found.plan.calibration for found in (with_fit, without))
    assert fitted is not None
    assert unfitted is not None
    assert not unfitted.refined
    assert fitted.holdout_loss <= unfitted.holdout_loss
    assert fitted.refined == (fitted.holdout_loss < unfitted.holdout_loss) != same(with_fit, without)
    if keep == 0.1:
        assert fitted.holdout_loss < 0.9 * unfitted.holdout_loss
        assert "factors fitted to the dense blocks" in calibration_words(fitted)
        assert "factors fitted" not in calibration_words(unfitted)


def test_there_is_nothing_to_leave_out_without_calibration() -> None:
    with pytest.raises(BadInput, match="`effort` is about calibration data"):
        compress(nn.Sequential(nn.Linear(8, 8)), keep=0.5, effort="balanced")
