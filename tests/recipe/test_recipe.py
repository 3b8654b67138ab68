"""The recipe itself: what it refuses, the schedules against torch and transformers, merging by trust."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from compressor.errors import BadInput
from compressor.recipe import TrainingRecipe, merge_recipes

STEPS = 47


def rates_of(make_scheduler: Any) -> list[float]:
    """The learning rate at each step, as the optimizer sees it, of a scheduler with peak 0.3."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def learning_rates(**fields: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    rates = TrainingRecipe(learning_rate=0.3, **fields).learning_rates()
    assert rates is not None
    assert rates.dtype == np.float64
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 9, STEPS, 0.3])
@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule: str, warmup: float) -> None:
    # transformers' TrainingArguments.get_warmup_steps rounds a share up.
    steps = math.ceil(warmup * STEPS) if warmup < 1 else int(warmup)
    expected = rates_of(lambda optimizer: get_scheduler(schedule, optimizer, steps, STEPS))
    found = learning_rates(schedule=schedule, warmup_steps=warmup, steps=STEPS)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("fields", "scheduler"),
    [
        ({"schedule": "linear"}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS)),
        (
            {"schedule": "CosineAnnealingLR"},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
        ),
        (
            {"schedule": "step", "step_milestones": (3, 3, 20), "step_factor": 0.2},
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 3, 20], 0.2),
        ),
        (
            {"schedule": "StepLR", "step_milestones": (10, 20, 30, 40), "step_factor": 0.5},
            lambda o: torch.optim.lr_scheduler.StepLR(o, 10, 0.5),
        ),
    ],
)
def test_schedules_are_those_of_torch(fields: dict[str, Any], scheduler: Any) -> None:
    found = learning_rates(**fields, steps=STEPS)
    np.testing.assert_allclose(found, rates_of(scheduler), rtol=1e-12, atol=1e-15)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine", "step"]),
    warmup=st.integers(0, STEPS),
    start=st.integers(0, STEPS),
    stop=st.integers(0, STEPS),
)
def test_part_of_a_schedule_is_cut_out_of_the_whole(schedule: str, warmup: int, start: int, *, stop: int) -> None:
    recipe = TrainingRecipe(
        learning_rate=0.3,
        schedule=schedule,
        warmup_steps=warmup,
        steps=STEPS,
        step_milestones=(5, 30),
        step_factor=0.1,
    )
    whole, part = recipe.learning_rates(), recipe.learning_rates(start, stop)
    assert whole is not None
    assert part is not None
    np.testing.assert_array_equal(part, whole[start:stop])
    assert whole.max() <= 0.3


def test_stopping_early_leaves_the_schedule_where_it_was() -> None:
    whole = learning_rates(schedule="cosine", steps=STEPS)
    stopped = learning_rates(schedule="cosine", steps=20, schedule_steps=STEPS)
    np.testing.assert_array_equal(stopped, whole[:20])


@pytest.mark.parametrize(
    "missing",
    [
        {"learning_rate": None},
        {"schedule": None},
        {"schedule": "polynomial"},
        {"steps": None},
        {"step_milestones": None},
        {"step_factor": None},
    ],
)
def test_unknown_learning_rates_are_none(missing: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "learning_rate": 0.1,
        "schedule": "step",
        "steps": 10,
        "step_milestones": (3,),
        "step_factor": 0.5,
    }
    assert TrainingRecipe(**fields).learning_rates() is not None
    recipe = TrainingRecipe(**(fields | missing))
    assert recipe.learning_rates() is None
    assert recipe.unknown_in_schedule


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(1, 50))
def test_steps_are_what_a_data_loader_would_make(dataset_size: int, batch_size: int, epochs: int) -> None:
    sampler = torch.utils.data.BatchSampler(range(dataset_size), batch_size, drop_last=False)
    total = TrainingRecipe(epochs=epochs, dataset_size=dataset_size, batch_size=batch_size).total_steps
    assert total == epochs * len(sampler)


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 100))
def test_epochs_and_steps_are_each_others_inverse(batches: int, batch_size: int, epochs: int) -> None:
    size = {"dataset_size": batches * batch_size, "batch_size": batch_size}
    steps = TrainingRecipe(epochs=epochs, **size).total_steps
    assert TrainingRecipe(steps=steps, **size).total_epochs == pytest.approx(epochs)


def test_known_steps_are_not_derived() -> None:
    known = {"epochs": 3, "dataset_size": 100, "batch_size": 10}
    assert TrainingRecipe(**known).total_steps == 30
    assert TrainingRecipe(**known, schedule_steps=40).total_steps == 40
    assert TrainingRecipe(**known, schedule_steps=40, steps=20).total_steps == 20
    assert TrainingRecipe(epochs=3, dataset_size=100).total_steps is None


IMPOSSIBLE: list[dict[str, Any]] = [
    {"learning_rate": -0.1},
    {"learning_rate": math.nan},
    {"learning_rate": math.inf},
    {"learning_rate": True},
    {"learning_rate": "fast"},
    {"learning_rate": 10**400},
    {"weight_decay": -1e-4},
    {"momentum": 1.0},
    {"momentum": -0.1},
    {"dampening": 1.5},
    {"batch_size": 0},
    {"batch_size": 2.5},
    {"batch_size": False},
    {"steps": 0},
    {"steps": 10.5},
    {"steps": 10**12},
    {"epochs": 0},
    {"epochs": 1e9, "dataset_size": 1000, "batch_size": 1},
    {"dataset_size": -1},
    {"sequence_length": 0},
    {"warmup_steps": -1},
    {"warmup_steps": 1.5},
    {"warmup_steps": 11, "steps": 10},
    {"warmup_steps": 11, "epochs": 1, "dataset_size": 100, "batch_size": 10},
    {"steps": 11, "schedule_steps": 10},
    {"step_milestones": (20, 10)},
    {"step_milestones": (1.5,)},
    {"step_milestones": 10},
    {"step_factor": 0},
    {"nesterov": 1},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"decoupled_weight_decay": "yes"},
    {"optimizer": "adamw", "decoupled_weight_decay": False},
    {"optimizer": "nesterov", "nesterov": False},
    {"optimizer": ""},
    {"optimizer": 3},
    {"schedule": 3},
    {"undecayed": "*.bias"},
    {"undecayed": (1,)},
]


@pytest.mark.parametrize("fields", IMPOSSIBLE, ids=str)
def test_impossible_recipes_are_refused_with_their_source(fields: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as caught:
        TrainingRecipe(**fields, sources=dict.fromkeys(fields, "flag --x"))
    message = str(caught.value)
    assert message.startswith("flag --x: ")
    assert any(name in message for name in fields)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given_name", "name", "family"),
    [
        ("SGD", "sgd", "sgd"),
        ("torch.optim.SGD", "sgd", "sgd"),
        ("sgdw", "sgdw", "sgd"),
        ("Nesterov", "sgd", "sgd"),
        ("heavy-ball", "sgd", "sgd"),
        ("AdamW", "adamw", "adaptive"),
        ("OptimizerNames.ADAMW_TORCH_FUSED", "adamw", "adaptive"),
        ("adamw_bnb_8bit", "adamw", "adaptive"),
        ("paged_lion_32bit", "lion", "adaptive"),
        ("muon", "muon", "adaptive"),
        ("galore_adamw", "galore_adamw", None),
        ("my optimizer", "my_optimizer", None),
    ],
)
def test_optimizers_have_one_name(given_name: str, name: str, family: str | None) -> None:
    recipe = TrainingRecipe(optimizer=given_name)
    assert (recipe.optimizer, recipe.family) == (name, family)


@pytest.mark.parametrize("name", [entry for entry in dir(torch.optim) if entry in {"SGD", "Adam", "AdamW", "Muon"}])
def test_decay_is_decoupled_where_torch_decouples_it(name: str) -> None:
    """A step without a gradient shrinks the weights by 1 - lr * wd exactly if the decay is decoupled."""
    weights = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))
    optimizer = getattr(torch.optim, name)([weights], lr=0.1, weight_decay=0.5)
    weights.grad = torch.zeros_like(weights)
    optimizer.step()
    decoupled = bool(torch.allclose(weights, 0.95 * torch.eye(3, dtype=torch.float64))) and name != "SGD"
    assert bool(TrainingRecipe(optimizer=name).decoupled_weight_decay) is decoupled


def test_names_imply_what_they_mean() -> None:
    assert TrainingRecipe(optimizer="nesterov").nesterov is True
    assert TrainingRecipe(optimizer="sgd").nesterov is None
    assert TrainingRecipe(optimizer="sgd").decoupled_weight_decay is None
    assert TrainingRecipe(optimizer="sgdw", sources={"optimizer": "x"}).sources == {
        "optimizer": "x",
        "decoupled_weight_decay": "x",
    }


def test_undecayed_parameters_are_told_by_name() -> None:
    recipe = TrainingRecipe(weight_decay=0.1, undecayed=("*.bias", "*LayerNorm*"))
    assert recipe.decays("layer.0.weight") is True
    assert recipe.decays("layer.0.bias") is False
    assert recipe.decays("encoder.layernorm.weight") is False
    assert TrainingRecipe(weight_decay=0.1).decays("layer.0.weight") is None
    assert TrainingRecipe(weight_decay=0.0).decays("layer.0.weight") is False


recipes = st.builds(
    TrainingRecipe,
    optimizer=st.none() | st.sampled_from(["sgd", "nesterov", "sgdw", "adam", "adamw"]),
    learning_rate=st.none() | st.floats(0, 10),
    schedule=st.none() | st.sampled_from(["constant", "cosine", "polynomial"]),
    step_milestones=st.none() | st.just((1, 2)),
    momentum=st.none() | st.floats(0, 0.99),
    weight_decay=st.none() | st.floats(0, 1),
    batch_size=st.none() | st.integers(1, 10**6),
    steps=st.none() | st.integers(1, 10**6),
    undecayed=st.none() | st.just(("*.bias",)),
    sources=st.just({"learning_rate": "somewhere", "batch_size": "elsewhere"}),
)


@given(recipes)
def test_dictionary_survives_json(recipe: TrainingRecipe) -> None:
    again = TrainingRecipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.sources == recipe.sources
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(again) == hash(recipe)


@given(recipes, recipes)
def test_merging_keeps_the_more_trusted_of_every_field(trusted: TrainingRecipe, other: TrainingRecipe) -> None:
    merged = merge_recipes(trusted, other).to_dict()
    values = trusted.to_dict()
    assert all(merged[name] == value for name, value in values.items() if value is not None and name != "sources")
    independent = {"learning_rate", "schedule", "weight_decay", "batch_size", "steps"}
    assert all(
        merged[name] == value for name, value in other.to_dict().items() if name in independent and values[name] is None
    )


@given(recipes)
def test_merging_with_nothing_or_itself_changes_nothing(recipe: TrainingRecipe) -> None:
    assert merge_recipes(recipe) == merge_recipes(TrainingRecipe(), recipe) == merge_recipes(recipe, recipe) == recipe


def test_merging_keeps_the_source_of_what_it_took() -> None:
    trusted = TrainingRecipe(learning_rate=0.1, sources={"learning_rate": "flag --lr"})
    card = TrainingRecipe(
        learning_rate=0.2, weight_decay=0.01, sources={"learning_rate": "card", "weight_decay": "card"}
    )
    merged = merge_recipes(trusted, card)
    assert (merged.learning_rate, merged.weight_decay) == (0.1, 0.01)
    assert merged.sources == {"learning_rate": "flag --lr", "weight_decay": "card"}


def test_what_is_said_of_one_optimizer_is_not_taken_for_another() -> None:
    flags = TrainingRecipe(optimizer="sgd", learning_rate=0.1)
    card = TrainingRecipe(optimizer="adamw", momentum=0.9, weight_decay=0.05)
    merged = merge_recipes(flags, card)
    assert merged.decoupled_weight_decay is None
    assert merged.momentum is None
    assert merged.weight_decay == 0.05
    assert merge_recipes(flags, TrainingRecipe(optimizer="sgd", momentum=0.9)).momentum == 0.9
    assert merge_recipes(flags, TrainingRecipe(momentum=0.9)).momentum == 0.9


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("learning_rat", "learning_rate"), ("lr", "learning_rate"), ("wd", "weight_decay"), ("batchsize", "batch_size")],
)
def test_unknown_keys_are_named_with_what_they_resemble(key: str, suggestion: str) -> None:
    with pytest.raises(BadInput, match=f"{key}.*did you mean.*{suggestion}"):
        TrainingRecipe.from_dict({key: 1}, source="recipe.yaml")
    with pytest.raises(BadInput, match="known are optimizer, "):
        TrainingRecipe.from_dict({"zzzzz": 1})
