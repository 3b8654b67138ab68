"""The window rule's caps on the ranks of a calibrated plan: when they are tried, and when they are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import BadInput, Plan, TrainingRecipe, inspect, plan
from compressor.data.builtin_data import digits
from compressor.planning import LayerPlan, MeasuredLayer, choose_ranks
from compressor.report.wording import calibration_words

SEARCH = "compressor.calibration.search"
STEPS, LEARNING_RATE, WEIGHT_DECAY = 400, 0.1, 0.03
KEEP = 0.6


@pytest.fixture(autouse=True)
def speaking_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the rule speak of a network that kept more of its start than it usually allows for: its caps then matter."""
    monkeypatch.setattr("compressor.planning.plan.LARGEST_SHARE", 0.5)


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    """A perceptron that kept exp(-1.2) of its initialization, above which only a few singular values stand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    images, labels = digits("train")
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


def recipe(optimizer: str = "sgd") -> TrainingRecipe:
    return TrainingRecipe(
        optimizer=optimizer, learning_rate=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY,
        momentum=0.0 if optimizer == "sgd" else None, batch_size=16, steps=STEPS,
    )  # fmt: skip


def batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = digits("train")
    return list(zip(images[:128].split(32), labels[:128].split(32), strict=True))


def planned(model: nn.Module, **options: Any) -> Plan:
    return plan(model, keep=KEEP, calibration=batches(), **options)


def edges(model: nn.Module) -> dict[str, int]:
    """How many singular values of each layer stand above the edge of its initialization."""
    found = inspect(model, recipe=recipe()).layers
    return {each.layer.name: each.initialization.above_edge or 0 for each in found if each.initialization is not None}


def judged_by(rank_of_a_pair: Callable[[int], float]) -> Callable[..., float]:
    """A loss on the holdout data that depends on the largest rank alone."""

    def loss(_: object, modules: Mapping[str, nn.Module]) -> float:
        ranks = [module.get_submodule("down").weight.shape[0] for module in modules.values()]
        return rank_of_a_pair(max(int(rank) for rank in ranks))

    return loss


@pytest.mark.slow
def test_the_caps_are_taken_where_they_lose_less_on_the_data_holdout(
    trained: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    caps = edges(trained)
    free = planned(trained)
    assert any((layer.rank or min(layer.shape)) > caps[layer.name] for layer in free.layers)
    monkeypatch.setattr(f"{SEARCH}.holdout_loss", judged_by(float))
    capped = planned(trained, recipe=recipe())
    assert all(layer.rank is not None and layer.rank <= caps[layer.name] for layer in capped.layers)
    assert capped.calibration is not None
    assert capped.calibration.capped
    assert capped.to_dict()["calibration"]["capped"] is True
    assert "capped by the window rule" in calibration_words(capped.calibration)


@pytest.mark.slow
def test_the_caps_are_left_where_they_lose_more(trained: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{SEARCH}.holdout_loss", judged_by(lambda rank: -float(rank)))
    free, tried = planned(trained), planned(trained, recipe=recipe())
    assert tried.layers == free.layers
    assert tried.calibration is not None
    assert not tried.calibration.capped
    assert "window rule" not in calibration_words(tried.calibration)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("known", "caps"),
    [(None, True), (recipe("adamw"), True), (recipe(), False)],
    ids=["no recipe", "AdamW", "switched off"],
)
def test_nothing_more_is_measured_where_there_is_no_cap(
    trained: nn.Sequential, known: TrainingRecipe | None, caps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def counted(_: object, modules: Mapping[str, nn.Module]) -> float:
        measured.append(len(modules))
        return 1.0

    monkeypatch.setattr(f"{SEARCH}.holdout_loss", counted)
    monkeypatch.setattr(f"{SEARCH}.STAGES", 0)
    planned(trained, recipe=recipe())
    with_caps = len(measured)
    measured.clear()
    monkeypatch.setattr(f"{SEARCH}.WINDOW_CAPS", caps)
    planned(trained, recipe=known)
    assert len(measured) == with_caps - 1


@pytest.mark.slow
def test_where_no_ranks_are_found_under_the_caps_the_plan_is_that_without_them(
    trained: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(layers: Sequence[MeasuredLayer], *arguments: Any) -> tuple[LayerPlan, ...]:
        if any(m.rank_cap is not None for m in layers):
            raise BadInput("no ranks were found", remedy="allow more")
        return choose_ranks(layers, *arguments)

    free = planned(trained)
    monkeypatch.setattr(f"{SEARCH}.choose_ranks", refusing)
    assert planned(trained, recipe=recipe()).layers == free.layers
