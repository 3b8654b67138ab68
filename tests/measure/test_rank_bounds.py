"""The rank bounds of the memory window against the measured ranks of small networks trained in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from compressor import memory_window
from compressor.errors import BadInput
from compressor.measure import frobenius_rank, singular_values
from compressor.measure.memory_window import forgetting_exponent, retention
from compressor.recipe import TrainingRecipe

EPSILON = 0.5
# Short for the networks: decay this strong would take them to zero.
STEPS = 10
CLASSES = 5
RECIPE = TrainingRecipe(
    optimizer="sgd", momentum=0, learning_rate=0.5, weight_decay=0.4, schedule="constant", steps=STEPS, batch_size=2
)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.studied = nn.Conv2d(5, 40, 3)
        self.normalize = nn.BatchNorm2d(40)
        self.head = nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.normalize(self.studied(x)).relu().mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.studied, self.key = nn.Linear(36, 36), nn.Linear(36, 36)
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.studied(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return self.head((weights @ x).mean(1))


class Experts(nn.Module):
    """Of four tokens the router sends the second and the last to the expert that is studied."""

    def __init__(self) -> None:
        super().__init__()
        self.studied, self.other = nn.Linear(36, 36), nn.Linear(36, 36)
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(x[:, ::2]).relu().mean(1) + self.studied(x[:, 1::2]).relu().mean(1))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.studied, self.head = nn.Linear(30, 36), nn.Linear(36, 36), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.studied(self.first(x).relu()).relu())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.studied = nn.Linear(30, 36), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.studied(self.first(x).relu())


@dataclass(frozen=True)
class Case:
    """A network whose layer `studied` is used `uses` times an example of `shape`, in `parts` batches of `batch`."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    uses: int
    parts: int = 1
    span: int | None = None


CASES = {
    "dense": Case(Dense, (30,), 2, 1),
    "gradient accumulation over two processes": Case(Dense, (30,), 1, 1, parts=4),
    "convolution with batch normalization": Case(Convolution, (5, 4, 4), 2, 4),
    "tokens": Case(Attention, (3, 36), 2, 3),
    "routed tokens": Case(Experts, (4, 36), 2, 2),
    "classifier": Case(Classifier, (30,), 8, 1, span=CLASSES - 1),
}


def matrix(model: nn.Module) -> Tensor:
    weight = model.get_parameter("studied.weight").detach().clone()
    return weight.flatten(1)


def trained(case: Case, *, steps: int = STEPS, examples: int | None = None) -> list[Tensor]:
    """The studied matrix before every step and at the end; with `examples` the same ones come again and again."""
    torch.manual_seed(0)
    model = case.build().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RECIPE.learning_rate or 0, weight_decay=0.4)
    passes = [matrix(model)]
    count = steps * case.parts * case.batch
    fresh = torch.randn(examples or count, *case.shape, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(fresh),))
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(case.parts):
            first = (step * case.parts + part) * case.batch
            chosen = torch.arange(first, first + case.batch) % len(fresh)
            loss = nn.functional.cross_entropy(model(fresh[chosen]), labels[chosen])
            (loss / case.parts).backward()
        optimizer.step()
        passes.append(matrix(model))
    return passes


def recipe_of(case: Case) -> TrainingRecipe:
    return TrainingRecipe.from_dict(RECIPE.to_dict() | {"batch_size": case.batch * case.parts})


@pytest.mark.parametrize("name", CASES)
def test_rank_that_training_wrote_is_bounded(name: str) -> None:
    case = CASES[name]
    weights = trained(case)
    recipe, shape = recipe_of(case), (weights[0].shape[0], weights[0].shape[1])
    steps = memory_window(recipe, shape, case.uses, epsilon=EPSILON).steps
    assert steps is not None
    before, after = weights[-1 - steps], weights[-1]
    ratio = float(before.norm() / after.norm())
    window = memory_window(recipe, shape, case.uses, epsilon=EPSILON, gradient_span=case.span, norm_ratio=ratio)
    assert window.rank_bound == (case.span or case.batch * case.parts * case.uses * steps)
    assert window.vacuous is False
    written = after - retention(recipe, steps).weights * before
    values = torch.linalg.svdvals(written)
    assert values[window.rank_bound] < 1e-12 * values[0]
    # A bound of twice the rank would be a mistake in what is counted.
    assert values[window.rank_bound // 2] > 1e-12 * values[0]
    # What the bound leaves out is no more than is said, relative to the final weights.
    assert window.residual is not None
    assert window.residual == pytest.approx(EPSILON * ratio)
    if window.residual < 1:
        assert frobenius_rank(singular_values(after), window.residual) <= window.rank_bound


def test_first_layer_writes_within_the_span_of_fixed_inputs_and_a_hidden_layer_does_not() -> None:
    examples = 3

    class First(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.studied = nn.Linear(36, 36), nn.Linear(30, 36)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(self.studied(x).relu()).relu())

    learned = {}
    for name, build in (("first", First), ("hidden", Dense)):
        weights = trained(Case(build, (30,), 3, 1), examples=examples)
        values = torch.linalg.svdvals(weights[-1] - retention(RECIPE, STEPS).weights * weights[0])
        learned[name] = int((values > 1e-10 * values[0]).sum())
    window = memory_window(recipe_of(Case(First, (30,), 3, 1)), (36, 30), 1, epsilon=EPSILON, gradient_span=examples)
    assert window.rank_bound == window.learned_rank_bound == examples
    assert learned["first"] <= examples
    assert learned["hidden"] > examples


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "sgd", "momentum": 0.8, "dampening": 0.5},
        {"optimizer": "nesterov", "momentum": 0.9},
    ],
)
def test_window_longer_than_training_bounds_what_training_added(optimizer: dict[str, object]) -> None:
    """Not W_T, not W_T - W_0: the initialization faded by weight decay is what has to be taken off."""
    steps = 6
    common = {"learning_rate": 0.05, "weight_decay": 0.05, "schedule": "constant", "steps": steps, "batch_size": 2}
    recipe = TrainingRecipe.from_dict(optimizer | common)
    window = memory_window(recipe, (40, 40), 1)
    assert window.exceeds_training is True
    assert window.rank_bound is None
    assert window.learned_rank_bound == 2 * steps
    assert f"rank at most {2 * steps}" in window.reason
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 40, dtype=torch.float64, generator=generator)
    weights = nn.Parameter(start.clone())
    sgd = torch.optim.SGD(
        [weights],
        lr=0.05,
        weight_decay=0.05,
        momentum=recipe.momentum or 0.0,
        dampening=recipe.dampening or 0.0,
        nesterov=bool(recipe.nesterov),
    )
    for _ in range(steps):
        x, target = (torch.randn(2, 40, dtype=torch.float64, generator=generator) for _ in range(2))
        sgd.zero_grad()
        (x @ weights.T - target).square().mean().backward()
        sgd.step()
    exponent, _ = forgetting_exponent(recipe)
    assert exponent is not None
    faded = torch.exp(torch.tensor(-exponent, dtype=torch.float64)) * start
    assert torch.linalg.matrix_rank(weights.detach() - faded, rtol=1e-11) == 2 * steps
    assert torch.linalg.matrix_rank(weights.detach() - start, rtol=1e-11) == 40


def test_each_parameter_group_has_the_window_of_its_weight_decay() -> None:
    torch.manual_seed(0)
    decays = {"body": 0.4, "head": 0.1, "bias": 0.0}
    start = {name: torch.randn(4, 4, dtype=torch.float64) for name in decays}
    ends = []
    for shift in (0.0, 1.0):
        groups = {name: nn.Parameter(values + shift) for name, values in start.items()}
        optimizer = torch.optim.SGD(
            [{"params": [groups[name]], "weight_decay": decay} for name, decay in decays.items()], lr=0.5
        )
        for _ in range(STEPS):
            for parameter in groups.values():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        ends.append({name: parameter.detach() for name, parameter in groups.items()})
    recipe = TrainingRecipe.from_dict(RECIPE.to_dict() | {"group_weight_decay": {"he*": 0.1}, "undecayed": ["bias"]})
    assert TrainingRecipe.from_dict(recipe.to_dict()) == recipe
    for name, decay in decays.items():
        of_group = recipe.of_parameter(name)
        assert (of_group.weight_decay, recipe.decays(name)) == (decay, decay > 0)
        left = float((ends[1][name] - ends[0][name]).mean())
        assert retention(of_group, STEPS).weights == pytest.approx(left, rel=1e-9)
    windows = {name: memory_window(recipe.of_parameter(name), (4, 4), 1, epsilon=0.2) for name in decays}
    assert 0.8 ** (windows["body"].steps or 0) <= 0.2 < 0.8 ** ((windows["body"].steps or 0) - 1)
    assert windows["head"].exceeds_training is True
    assert "without weight decay" in windows["bias"].reason


@pytest.mark.parametrize("groups", [{"a": -0.1}, {"a": "much"}, ["a"], {"a": True}])
def test_group_weight_decay_is_names_and_numbers(groups: object) -> None:
    with pytest.raises(BadInput, match="group_weight_decay"):
        TrainingRecipe.from_dict({"group_weight_decay": groups})


def test_norm_that_collapses_is_flagged() -> None:
    """Weights that nothing refills decay as fast as they are forgotten: then all of them are residual."""
    weights = nn.Parameter(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD([weights], lr=0.5, weight_decay=0.4)
    norms = [float(weights.detach().norm())]
    for _ in range(40):
        weights.grad = torch.zeros_like(weights)
        optimizer.step()
        norms.append(float(weights.detach().norm()))
    longer = TrainingRecipe.from_dict(RECIPE.to_dict() | {"steps": 40})
    steps = memory_window(longer, (8, 8), 1).steps
    assert steps is not None
    fallen = memory_window(longer, (8, 8), 1, norm_ratio=norms[-1 - steps] / norms[-1])
    assert fallen.collapsing is True
    assert fallen.residual == pytest.approx(0.1 / 0.8**steps)
    assert fallen.residual is not None
    assert fallen.residual >= 1
    kept = memory_window(longer, (8, 8), 1, norm_ratio=1.0)
    assert (kept.collapsing, kept.residual) == (False, 0.1)
    assert memory_window(longer, (8, 8), 1).collapsing is None


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "shampoo", "muon"])
def test_bound_is_given_only_where_it_holds(optimizer: str) -> None:
    """The bound and its caps need updates that are combinations of gradients."""
    recipe = TrainingRecipe.from_dict(
        RECIPE.to_dict() | {"optimizer": optimizer, "decoupled_weight_decay": optimizer != "sgd"}
    )
    window = memory_window(recipe, (64, 64), 1, epsilon=EPSILON, gradient_span=3)
    assert window.steps is not None
    assert (window.rank_bound is not None) == (window.learned_rank_bound is not None) == (optimizer == "sgd")


def test_more_uses_never_lower_the_bound() -> None:
    bounds = [memory_window(RECIPE, (9, 9), uses, epsilon=EPSILON).rank_bound or 0 for uses in range(1, 6)]
    assert all(later > earlier for earlier, later in pairwise(bounds))


@pytest.mark.parametrize(
    "wrong", [{"shape": (0, 3)}, {"uses": 0}, {"gradient_span": -1}, {"norm_ratio": 0.0}, {"norm_ratio": float("nan")}]
)
def test_sizes_are_positive(wrong: dict[str, object]) -> None:
    request: dict[str, object] = {"shape": (4, 4), "uses": 1} | wrong
    with pytest.raises(BadInput):
        memory_window(RECIPE, **request)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_public_name_is_the_function_whatever_was_imported_before() -> None:
    code = (
        "import compressor.measure.memory_window; import compressor; "
        "assert callable(compressor.memory_window) and compressor.memory_window.__name__ == 'memory_window'"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
