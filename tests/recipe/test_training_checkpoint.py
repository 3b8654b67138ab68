"""The recipe that a training checkpoint holds itself, from real optimizers and schedulers of torch."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim import lr_scheduler as schedulers

import compressor
from compressor.measure.memory_window import forgetting_exponent
from compressor.recipe import TrainingRecipe

Logged = pytest.LogCaptureFixture


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def stepped(model: nn.Module, optimizer: Optimizer, steps: int, *, scheduler: Any = None, every: int = 1) -> None:
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(torch.ones(1, 8)).square().sum().backward()
        optimizer.step()
        if scheduler is not None and step % every == 0:
            scheduler.step()


def recipe_of(folder: Path, document: dict[str, Any], name: str = "run.pt", **options: Any) -> TrainingRecipe:
    torch.save(document, folder / name, **options)
    return compressor.inspect(folder / name).recipe


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
            {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "dampening": 0, "weight_decay": 5e-4},
        ),
        (lambda p: SGD(p, lr=0.1), {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "nesterov": False}),
        (
            lambda p: AdamW(p, lr=0.1, weight_decay=0.05),
            {"optimizer": "adamw", "decoupled_weight_decay": True, "weight_decay": 0.05, "steps": 3},
        ),
        (lambda p: Adam(p, lr=0.1, weight_decay=0.05), {"optimizer": "adam", "weight_decay": 0.05, "steps": 3}),
        (lambda p: RMSprop(p, lr=0.1, weight_decay=0.05), {"optimizer": "rmsprop", "weight_decay": 0.05, "steps": 3}),
        (lambda p: torch.optim.NAdam(p, lr=0.1), {"optimizer": "nadam", "steps": 3}),
        (lambda p: torch.optim.RAdam(p, lr=0.1), {"optimizer": "radam", "steps": 3}),
        (lambda p: torch.optim.Adamax(p, lr=0.1), {"optimizer": "adamax", "steps": 3}),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), {"optimizer": "adagrad", "steps": 3}),
        (lambda p: torch.optim.Adadelta(p, lr=0.1), {"optimizer": "adadelta", "steps": 3}),
        (lambda p: torch.optim.Adafactor(p, lr=0.1), {"optimizer": "adafactor", "steps": 3}),
    ],
)
def test_the_groups_of_an_optimizer_tell_what_ran(
    tmp_path: Path, make: Callable[[Any], Optimizer], expected: dict[str, Any], *, legacy: bool
) -> None:
    model = network()
    optimizer = make(model.parameters())
    stepped(model, optimizer, 3)
    document = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    recipe = recipe_of(tmp_path, document, _use_new_zipfile_serialization=not legacy)
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert (recipe.learning_rate, recipe.undecayed) == (0.1, ())
    # Nothing says that the learning rate stayed what it is.
    assert recipe.schedule is None
    assert set(recipe.sources.values()) == {"run.pt: optimizer"}


def test_older_states_of_adam_and_adamw_are_not_told_apart_by_guess(tmp_path: Path, caplog: Logged) -> None:
    model = network()
    optimizer = AdamW(model.parameters(), weight_decay=0.05)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("decoupled_weight_decay", None)
    recipe = recipe_of(tmp_path, {"model": model.state_dict(), "optimizer": state})
    assert (recipe.optimizer, recipe.weight_decay) == (None, 0.05)
    assert "Adam and AdamW are alike" in caplog.text
    told = {"model": model.state_dict(), "optimizer": state, "args": argparse.Namespace(opt="adamw", lr=1e-3)}
    assert recipe_of(tmp_path, told).optimizer == "adamw"


@pytest.mark.parametrize("named", [False, True])
def test_groups_without_decay_are_told_by_name(tmp_path: Path, named: bool) -> None:
    model = network()
    split = groups(model, 0.1)
    if named:
        for group in split:
            own = {id(p) for p in group["params"]}
            group["params"] = [(name, p) for name, p in model.named_parameters() if id(p) in own]
    optimizer = AdamW(split)
    stepped(model, optimizer, 2)
    recipe = recipe_of(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert recipe.weight_decay == 0.1
    for name, parameter in model.named_parameters():
        assert recipe.decays(name) == (parameter.ndim > 1)


def schedule_of(kind: str, optimizer: Optimizer, length: int) -> Any:
    """A scheduler of torch that is laid out for so many of its steps."""
    if kind == "sequence":
        warmup = schedulers.LinearLR(optimizer, 0.01, 1.0, total_iters=2)
        return schedulers.SequentialLR(optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, length - 2)], [2])
    return {
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, length),
        "floor": lambda: schedulers.CosineAnnealingLR(optimizer, length, eta_min=0.01),
        "multistep": lambda: schedulers.MultiStepLR(optimizer, [4, 6], gamma=0.1),
        "step": lambda: schedulers.StepLR(optimizer, 3, gamma=0.5),
        "polynomial": lambda: schedulers.PolynomialLR(optimizer, length, power=1.0),
        "to zero": lambda: schedulers.LinearLR(optimizer, 1.0, 0.0, total_iters=length),
        "onecycle": lambda: schedulers.OneCycleLR(optimizer, max_lr=0.4, total_steps=length + 1),
        "cyclic": lambda: schedulers.CyclicLR(optimizer, base_lr=0.01, max_lr=0.3, cycle_momentum=False),
        "lambda": lambda: schedulers.LambdaLR(optimizer, lambda step: 0.5),
        "exponential": lambda: schedulers.ExponentialLR(optimizer, 0.9),
        "restarts": lambda: schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
        "plateau": lambda: schedulers.ReduceLROnPlateau(optimizer),
    }[kind]()


SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"schedule": "cosine", "schedule_steps": 8},
    "floor": {"schedule": "cosine_with_min_lr"},
    "multistep": {"schedule": "step", "step_milestones": (4, 6), "step_factor": 0.1},
    "step": {"schedule": "step", "step_milestones": (3, 6), "step_factor": 0.5},
    "polynomial": {"schedule": "linear", "schedule_steps": 8},
    "to zero": {"schedule": "linear", "schedule_steps": 8},
    "sequence": {"schedule": "cosine", "schedule_steps": 8, "warmup_steps": 2},
    # These begin with a warm-up of their own.
    "onecycle": {"schedule": "one_cycle", "learning_rate": 0.4, "warmup_steps": None},
    "cyclic": {"schedule": "cyclic", "learning_rate": 0.3, "warmup_steps": None},
    "lambda": {"schedule": None},
    "exponential": {"schedule": "exponential"},
    "restarts": {"schedule": "cosine_with_restarts"},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_scheduler_is_read_in_steps_of_the_optimizer(tmp_path: Path, kind: str, every: int) -> None:
    """Whether it stepped with the optimizer or after every epoch of five steps."""
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.2, weight_decay=0.1)
    scheduler = schedule_of(kind, optimizer, 8)
    stepped(model, optimizer, 7 * every, scheduler=scheduler, every=every)
    document = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    recipe = recipe_of(tmp_path, document)
    expected = {"learning_rate": 0.2, "steps": 7 * every} | SCHEDULES[kind]
    for name in ("schedule_steps", "warmup_steps"):
        if expected.get(name) is not None:
            expected[name] *= every
    if "step_milestones" in expected:
        expected["step_milestones"] = tuple(each * every for each in expected["step_milestones"])
    assert {name: getattr(recipe, name) for name in expected} == expected
    if every == 1 and kind in ("cosine", "multistep", "step", "polynomial", "to zero"):
        again = AdamW(network().parameters(), lr=0.2)
        ran = schedule_of(kind, again, 8)
        rates = []
        for _ in range(7):
            rates.append(again.param_groups[0]["lr"])
            again.step()
            ran.step()
        assert recipe.learning_rates() == pytest.approx(rates)


def test_a_scheduler_that_counts_epochs_says_no_steps(tmp_path: Path) -> None:
    """SGD's state counts no steps: with the data's size the epochs become steps."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    scheduler = schedulers.CosineAnnealingLR(optimizer, 6)
    stepped(model, optimizer, 60, scheduler=scheduler, every=10)
    document = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 6}
    recipe = recipe_of(
        tmp_path, document | {"scheduler": scheduler.state_dict(), "args": {"batch_size": 32, "lr": 0.02}}
    )
    assert (recipe.schedule, recipe.epochs, recipe.steps, recipe.batch_size) == ("cosine", 6, None, 32)
    assert forgetting_exponent(recipe) == (None, "the number of steps is unknown")
    known = compressor.inspect(tmp_path / "run.pt", recipe=TrainingRecipe(dataset_size=320)).recipe
    assert known.total_steps == 60
    exponent, _ = forgetting_exponent(known)
    assert exponent == pytest.approx(60 * 0.01 * 0.1 / 0.1, rel=0.3)  # half the peak on average, over 1 - momentum
    # Without anything that counts, epochs and steps cannot be told apart: no schedule is claimed.
    del document["epoch"]
    assert recipe_of(tmp_path, document | {"scheduler": scheduler.state_dict()}).schedule is None


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.2, weight_decay=0.1)
    scheduler = schedulers.CosineAnnealingLR(optimizer, 20)
    stepped(model, optimizer, 10, scheduler=scheduler)
    recipe = recipe_of(
        tmp_path,
        {
            "epoch": 1,
            "global_step": 10,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()},
            "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": 2, "completed": 2}}}},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.25)}},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [scheduler.state_dict()],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.2, "batch_size": 16, "model": {"width": 6}, "dataset_size": 80},
        },
        "epoch=1-step=10.ckpt",
    )
    expected = TrainingRecipe(
        optimizer="adamw",
        decoupled_weight_decay=True,
        learning_rate=0.2,
        weight_decay=0.1,
        schedule="cosine",
        warmup_steps=0,
        steps=10,
        schedule_steps=20,
        epochs=2,
        batch_size=16,
        dataset_size=80,
        undecayed=(),
    )
    assert recipe == expected
    assert recipe.sources["batch_size"] == "epoch=1-step=10.ckpt: hyper_parameters"
    assert recipe.sources["schedule"] == "epoch=1-step=10.ckpt: lr_schedulers"


ARGUMENTS = {
    "args": argparse.Namespace(opt="sgd", lr=0.3, wd=1e-4, momentum=0.9, epochs=90, batch_size=64, world_size=2),
    "config": {
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.3, "weight_decay": 1e-4, "momentum": 0.9},
        "training": {"max_epochs": 90, "batch_size": 64, "accumulate_grad_batches": 2},
    },
    "trainer_args": {"optimizer_name": "SGD", "learning-rate": "0.3", "weight_decay": [1e-4], "momentum": 0.9}
    | {"num_epochs": 90, "total_batch_size": 128},
}


@pytest.mark.parametrize("key", ARGUMENTS)
def test_the_settings_of_a_script_are_read_by_the_names_it_gives_them(tmp_path: Path, key: str) -> None:
    recipe = recipe_of(tmp_path, {"model": network().state_dict(), key: ARGUMENTS[key], "epoch": 89})
    assert recipe == TrainingRecipe(
        optimizer="sgd", learning_rate=0.3, weight_decay=1e-4, momentum=0.9, epochs=90, batch_size=128
    )
    assert set(recipe.sources.values()) == {f"run.pt: {key}"}


def test_a_batch_shared_by_an_unknown_number_of_processes_is_unknown(tmp_path: Path) -> None:
    settings = argparse.Namespace(lr=0.1, batch_size=64, dist_url="env://")
    assert recipe_of(tmp_path, {"model": network().state_dict(), "args": settings}).batch_size is None


def test_a_rate_that_never_changed_was_constant(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    stepped(model, optimizer, 3)
    document = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": 3}
    assert recipe_of(tmp_path, document | {"args": argparse.Namespace(lr=0.2)}).schedule == "constant"
    # A script that sets the rate itself leaves another one than it was given: that one was the peak.
    lowered = recipe_of(tmp_path, document | {"args": argparse.Namespace(lr=0.8)})
    assert (lowered.schedule, lowered.learning_rate, lowered.steps) == (None, 0.8, 3)


def test_what_ran_is_trusted_more_than_what_was_asked_and_both_are_said(tmp_path: Path, caplog: Logged) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.8, weight_decay=0.1)
    document = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    document["args"] = argparse.Namespace(lr=0.2, momentum=0.9)
    (tmp_path / "recipe.yaml").write_text("weight_decay: 0.3\nmomentum: 0.8\n")
    recipe = recipe_of(tmp_path, document)
    assert (recipe.momentum, recipe.weight_decay) == (0.8, 0.1)
    said = [record.getMessage() for record in caplog.records]
    assert any("momentum is 0.8 in run.pt: optimizer and 0.9 in run.pt: args; the first is used" in one for one in said)
    assert any("weight decay is 0.1 in run.pt: optimizer and 0.3 in recipe.yaml" in one for one in said)
    # Whoever asks for another value knows.
    caplog.clear()
    asked = compressor.inspect(tmp_path / "run.pt", recipe=TrainingRecipe(momentum=0.5, weight_decay=0.2)).recipe
    assert (asked.momentum, asked.weight_decay) == (0.5, 0.2)
    assert "the first is used" not in caplog.text


def test_optimizers_of_several_networks_tell_what_they_agree_on(tmp_path: Path, caplog: Logged) -> None:
    model = network()
    optimizers = [AdamW(model.parameters(), lr=0.1, weight_decay=decay) for decay in (0.1, 0.2)]
    document = {"model": model.state_dict(), "optimizer_states": [each.state_dict() for each in optimizers]}
    recipe = recipe_of(tmp_path, document)
    assert (recipe.optimizer, recipe.weight_decay) == ("adamw", None)
    assert "2 optimizers; only what they agree on" in caplog.text


def test_states_beside_a_model_are_read_without_their_tensors(tmp_path: Path) -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.2, weight_decay=0.1)
    scheduler = schedulers.PolynomialLR(optimizer, 50, power=1.0)
    stepped(model, optimizer, 4, scheduler=scheduler)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    recipe = recipe_of(tmp_path, model.state_dict(), "pytorch_model.bin")
    assert (recipe.optimizer, recipe.schedule, recipe.steps, recipe.schedule_steps) == ("adamw", "linear", 4, 50)
    assert recipe.sources["schedule"] == "optimizer.pt and scheduler.pt: scheduler"


@pytest.mark.parametrize(
    "odd",
    [
        {"optimizer": {"param_groups": [{"lr": float("nan"), "weight_decay": -1, "params": 3}, 7], "state": [1]}},
        {"optimizer": {"param_groups": [{}], "state": {0: None, 1: {"step": "x"}}}},
        {"scheduler": {"last_epoch": 10**30, "T_max": "x", "base_lrs": 3}, "epoch": -1, "global_step": True},
        {"scheduler": {"last_epoch": 3, "_schedulers": [{"last_epoch": 1}, None], "_milestones": ["x"]}, "epoch": 3},
        {"args": {"lr": 10**400, "epochs": [], "batch_size": 0, "optimizer": {"type": 7}}, "hyper_parameters": [3]},
        {"lr_schedulers": [[{"last_epoch": 1}]], "optimizer_states": {"a": {"param_groups": None}}},
    ],
)
def test_odd_states_neither_fail_nor_make_up_a_recipe(tmp_path: Path, odd: dict[str, Any], caplog: Logged) -> None:
    with caplog.at_level(logging.ERROR):
        recipe = recipe_of(tmp_path, {"model": network().state_dict(), **odd})
    assert (recipe.learning_rate, recipe.weight_decay, recipe.steps) == (None, None, None)
    assert recipe.schedule in (None, "sequence")  # of which nothing more is known
