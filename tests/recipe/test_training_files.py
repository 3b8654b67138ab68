"""Reading recipes from the files that training programs leave, and finding them beside a model."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.modelcard import TrainingSummary, extract_hyperparameters_from_trainer

from compressor.errors import BadInput
from compressor.recipe import (
    TrainingRecipe,
    find_recipe,
    read_deepspeed_config,
    read_model_card,
    read_recipe,
    read_recipe_file,
    read_timm_args,
    read_trainer_state,
    read_training_args,
)

REFERENCE_CARD = """\
---
license: apache-2.0
---

# A model

- learning_rate: 99

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.05
- train_batch_size: 8
- eval_batch_size: 64
- seed: 0
- num_devices: 2
- gradient_accumulation_steps: 2
- total_train_batch_size: 32
- optimizer: Use OptimizerNames.SGD and the args are:
momentum=0.9, nesterov=True
- lr_scheduler_type: cosine
- lr_scheduler_warmup_ratio: 0.1
- num_epochs: 30.0
- weight_decay: 5e-4
- dataset_size: 1000
- sequence_length: 1
- undecayed: *.bias, *norm*

### Training results

- weight_decay: 77
"""


def arguments(tmp_path: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, **changes)


def card_of_trainer(args: TrainingArguments) -> str:
    """The card that transformers writes for a Trainer with these arguments."""
    hyperparameters = extract_hyperparameters_from_trainer(Trainer(model=torch.nn.Linear(2, 2), args=args))
    return str(TrainingSummary(model_name="m", hyperparameters=hyperparameters).to_model_card())


def saved_arguments(tmp_path: Path, *, legacy: bool = False, **changes: Any) -> Path:
    path = tmp_path / "training_args.bin"
    torch.save(arguments(tmp_path, **changes), path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_training_arguments_of_transformers(tmp_path: Path, legacy: bool) -> None:
    path = saved_arguments(
        tmp_path,
        legacy=legacy,
        optim="adamw_torch_fused",
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        num_train_epochs=2,
    )
    recipe = read_training_args(path)
    assert recipe == TrainingRecipe(
        optimizer="adamw",
        decoupled_weight_decay=True,
        learning_rate=3e-4,
        schedule="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        batch_size=12,
        epochs=2,
        undecayed=recipe.undecayed,
        seed=42,
    )
    assert set(recipe.sources.values()) == {"training_args.bin"}


def test_training_arguments_by_steps(tmp_path: Path) -> None:
    path = saved_arguments(
        tmp_path,
        optim="sgd",
        optim_args="momentum=0.9,nesterov=true,weight_decay=0.01",
        max_steps=500,
        warmup_steps=0.1,
        lr_scheduler_type="linear",
    )
    recipe = read_training_args(path)
    assert (recipe.optimizer, recipe.momentum, recipe.nesterov, recipe.weight_decay) == ("sgd", 0.9, True, 0.01)
    assert (recipe.schedule_steps, recipe.steps, recipe.total_steps, recipe.epochs) == (500, None, 500, None)
    assert recipe.warmup_steps == 0.1


def test_what_a_trainer_is_not_told_it_does_not_do(tmp_path: Path) -> None:
    recipe = read_training_args(saved_arguments(tmp_path, optim="sgd", lr_scheduler_type="constant", warmup_steps=7))
    assert recipe.momentum == 0  # torch.optim.SGD's own
    assert recipe.warmup_steps == 0  # transformers' constant schedule has no warm-up
    # With arguments of its own the schedule is no longer the one that its name says.
    changed = saved_arguments(tmp_path, lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": 2})
    assert read_training_args(changed).schedule is None


def test_undecayed_parameters_are_those_of_the_trainer(tmp_path: Path) -> None:
    recipe = read_training_args(saved_arguments(tmp_path, weight_decay=0.1))
    model = torch.nn.ModuleDict(
        {
            "first": torch.nn.Linear(3, 3),
            "norm": torch.nn.BatchNorm1d(3),
            "final_norm": torch.nn.BatchNorm1d(3),
            "normal": torch.nn.Linear(3, 3),
            "attention": torch.nn.ModuleDict({"rmsnorm": torch.nn.RMSNorm(3), "query": torch.nn.Linear(3, 3)}),
        }
    )
    decayed = Trainer.get_decay_parameter_names(None, model)
    assert 3 <= len(decayed) < len(list(model.parameters()))
    assert [name for name, _ in model.named_parameters() if recipe.decays(name)] == decayed


class Payload:
    """Unpickled in earnest, it runs a shell command that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickled_code_stays_unexecuted(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "training_args.bin"
    hostile = arguments(tmp_path, learning_rate=0.25)
    hostile.run_name = Payload(mark)  # type: ignore[assignment]
    if form == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=form == "zip")
    assert read_training_args(path).learning_rate == 0.25
    assert not mark.exists()
    # The payload is what it claims to be.
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists()


def test_only_plain_values_are_taken(tmp_path: Path) -> None:
    """A value of any other type is unknown, whatever stands for it in the pickle."""
    odd = arguments(tmp_path, learning_rate=0.25)
    odd.weight_decay = [0.1]  # type: ignore[assignment]
    odd.per_device_train_batch_size = Payload(tmp_path / "mark")  # type: ignore[assignment]
    path = tmp_path / "training_args.bin"
    torch.save(odd, path)
    recipe = read_training_args(path)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.batch_size) == (0.25, None, None)


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", content)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"version https://git-lfs.github.com/spec/v1\n",
        pickle.dumps({"learning_rate": 0.1}),
        pickle.dumps(3),
        zipped(pickle.dumps(3)[:-1]),
        zipped(bytes(2**21)),
        zipfile.ZipFile(io.BytesIO(), "w").fp.getvalue() + b"PK\x05\x06" + bytes(18),  # type: ignore[union-attr]
        # An index for which the unpickler would make room for four thousand million objects.
        b"\x80\x02Nr\xff\xff\xff\xff.",
    ],
    ids=["empty", "cut", "git-lfs", "dict", "int", "cut-zip", "zip-bomb", "empty-zip", "memo-bomb"],
)
def test_what_is_no_training_arguments_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "training_args.bin"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"training_args\.bin: "):
        read_training_args(path)


def test_trainer_state_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    state = TrainerState(epoch=1.5, global_step=300, max_steps=1000, num_train_epochs=5, train_batch_size=8)
    state.log_history = [{"learning_rate": 0.001, "step": 10}]
    state.save_to_json(str(path))
    # One process's batch size and a sample of the learning rate are not the recipe's.
    assert read_trainer_state(path) == TrainingRecipe(steps=300, schedule_steps=1000, epochs=1.5)


def test_card_that_transformers_writes(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    args = arguments(
        tmp_path,
        optim="adamw_torch",
        learning_rate=2e-5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_steps=1000,
    )
    path.write_text(card_of_trainer(args))
    assert read_model_card(path) == TrainingRecipe(
        optimizer="adamw",
        decoupled_weight_decay=True,
        learning_rate=2e-5,
        schedule="cosine",
        warmup_steps=50,
        batch_size=16,
        steps=1000,
        seed=42,
    )


def test_card_of_sgd_that_transformers_writes(tmp_path: Path) -> None:
    common = {"optim": "sgd", "lr_scheduler_type": "constant", "num_train_epochs": 3}
    path = tmp_path / "README.md"
    for optim_args, momentum in ((None, 0.0), ("momentum=0.8", 0.8)):
        path.write_text(card_of_trainer(arguments(tmp_path, optim_args=optim_args, **common)))
        recipe = read_model_card(path)
        assert (recipe.optimizer, recipe.momentum, recipe.epochs) == ("sgd", momentum, 3)
        assert (recipe.schedule, recipe.warmup_steps, recipe.batch_size) == ("constant", 0, 8)


def test_card_with_further_lines(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(REFERENCE_CARD)
    recipe = read_model_card(path)
    assert recipe == TrainingRecipe(
        optimizer="sgd",
        momentum=0.9,
        nesterov=True,
        learning_rate=0.05,
        schedule="cosine",
        warmup_steps=0.1,
        weight_decay=5e-4,
        batch_size=32,
        epochs=30,
        dataset_size=1000,
        sequence_length=1,
        undecayed=("*.bias", "*norm*"),
        seed=0,
    )
    assert recipe.total_steps == 30 * 32
    assert set(recipe.sources.values()) == {"README.md (model card)"}


@pytest.mark.parametrize(
    ("line", "optimizer", "decoupled"),
    [
        # What Trainers wrote over the years for AdamW, and what a person writes for Adam.
        ("Adam with betas=(0.9,0.999) and epsilon=1e-08", "adamw", True),
        ("Use adamw_torch with betas=(0.9,0.999) and epsilon=1e-08 and optimizer_args=No args", "adamw", True),
        ("Use OptimizerNames.ADAMW_BNB with betas=(0.9,0.999) and epsilon=1e-08", "adamw", True),
        ("Adafactor", "adafactor", True),
        ("Adam", "adam", None),
        ("SGD", "sgd", None),
    ],
)
def test_optimizer_lines_of_cards(tmp_path: Path, line: str, optimizer: str, *, decoupled: bool | None) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"### Training hyperparameters\n\n- optimizer: {line}\n- momentum: 0.5\n")
    recipe = read_model_card(path)
    assert (recipe.optimizer, recipe.decoupled_weight_decay, recipe.momentum) == (optimizer, decoupled, 0.5)


def test_card_without_hyperparameters_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# A model\n\n- learning_rate: 3\n\n### Training hyperparameters\n\nMore information needed\n")
    assert read_model_card(path) == TrainingRecipe()


def test_timm_arguments(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    written: dict[str, Any] = {
        "batch_size": 128,
        "grad_accum_steps": 2,
        "epochs": 300,
        "lr": 0.5,
        "min_lr": 0,
        "model": "resnet50",
        "momentum": 0.9,
        "opt": "sgd",
        "sched": "cosine",
        "warmup_epochs": 5,
        "weight_decay": 2e-5,
    }
    path.write_text(yaml.safe_dump(written))
    recipe = read_timm_args(path)
    # timm's "sgd" is Nesterov's; how many processes shared the work is not in the file.
    assert recipe == TrainingRecipe(
        optimizer="sgd",
        nesterov=True,
        momentum=0.9,
        learning_rate=0.5,
        schedule="cosine",
        warmup_steps=5 / 300,
        weight_decay=2e-5,
        epochs=300,
    )
    path.write_text(yaml.safe_dump(written | {"world_size": 8}))
    assert read_timm_args(path).batch_size == 128 * 2 * 8
    path.write_text(yaml.safe_dump(written | {"distributed": False, "opt": "momentum", "min_lr": 0.1}))
    single = read_timm_args(path)
    assert (single.batch_size, single.nesterov, single.schedule) == (256, False, "cosine_with_min_lr")
    path.write_text(yaml.safe_dump(written | {"opt": "adamw", "lr": None}))
    adaptive = read_timm_args(path)
    assert (adaptive.optimizer, adaptive.momentum, adaptive.learning_rate) == ("adamw", None, None)


def test_deepspeed_configuration(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    config: dict[str, Any] = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_max_lr": 2e-4, "warmup_num_steps": 100, "total_num_steps": 5000},
        },
    }
    path.write_text(json.dumps(config))
    assert read_deepspeed_config(path) == TrainingRecipe(
        optimizer="adam",
        decoupled_weight_decay=True,  # DeepSpeed's Adam is AdamW unless told otherwise
        learning_rate=2e-4,
        schedule="linear",
        warmup_steps=100,
        weight_decay=0.1,
        batch_size=64,
        schedule_steps=5000,
    )
    config["optimizer"]["params"]["adam_w_mode"] = False
    path.write_text(json.dumps(config))
    assert read_deepspeed_config(path).decoupled_weight_decay is False


def test_auto_is_unknown_to_deepspeed(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    parameters = dict.fromkeys(("lr", "weight_decay"), "auto")
    schedule = dict.fromkeys(("warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
    config = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": parameters},
        "scheduler": {"type": "WarmupLR", "params": schedule},
    }
    path.write_text(json.dumps(config))
    expected = TrainingRecipe(optimizer="adamw", decoupled_weight_decay=True, schedule="constant")
    assert read_deepspeed_config(path) == expected


def test_plain_recipe_in_yaml_and_json(tmp_path: Path) -> None:
    recipe = TrainingRecipe(
        optimizer="sgd",
        momentum=0.9,
        learning_rate=5e-4,
        schedule="step",
        step_milestones=(10, 20),
        step_factor=0.1,
        undecayed=("*.bias",),
    )
    as_json, as_yaml = tmp_path / "recipe.json", tmp_path / "recipe.yaml"
    as_json.write_text(json.dumps(recipe.to_dict()))
    # 5e-4 without a point is text in YAML 1.1.
    as_yaml.write_text(
        "optimizer: sgd\nmomentum: .9\nlearning_rate: 5e-4\nschedule: step\n"
        "step_milestones: [10, 20]\nstep_factor: 0.1\nundecayed: ['*.bias']\n"
    )
    assert read_recipe_file(as_json) == read_recipe_file(as_yaml) == recipe
    assert set(read_recipe_file(as_yaml).sources.values()) == {"recipe.yaml"}
    as_yaml.write_text("learning_rate: 0.1\nweight_deacy: 0.1\n")
    with pytest.raises(BadInput, match=r"recipe\.yaml: .*'weight_deacy'; did you mean weight_decay"):
        read_recipe_file(as_yaml)


def test_any_format_is_told_by_its_content(tmp_path: Path) -> None:
    contents: dict[str, object] = {
        "card.txt": REFERENCE_CARD,
        "plain.yaml": "learning_rate: 0.05\n",
        "timm.yaml": "opt: sgd\nsched: cosine\nlr: 0.05\n",
        "ds.json": json.dumps({"optimizer": {"type": "SGD", "params": {"lr": 0.05}}}),
    }
    paths = [tmp_path / name for name in contents]
    for path in paths:
        path.write_text(str(contents[path.name]))
    paths.append(saved_arguments(tmp_path, learning_rate=0.05).rename(tmp_path / "args"))
    paths.append(saved_arguments(tmp_path, legacy=True, learning_rate=0.05).rename(tmp_path / "legacy"))
    assert [read_recipe(path).learning_rate for path in paths] == [0.05] * 6
    state = tmp_path / "state.json"
    TrainerState(global_step=7, max_steps=9).save_to_json(str(state))
    assert read_recipe(state).steps == 7
    # A key of another format's in a plain recipe is an error, and not a reason to take it for that format.
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text("learning_rate: 0.05\ntrain_batch_size: 4\n")
    with pytest.raises(BadInput, match="train_batch_size"):
        read_recipe(mixed)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_recipe_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"no such file|Is a directory"):
        read_recipe(tmp_path / name)


def everything_beside(folder: Path) -> None:
    """Every file that is looked for, each with a learning rate or a step count that tells it apart."""
    saved_arguments(folder, learning_rate=0.03, lr_scheduler_type="linear", max_steps=90)
    TrainerState(global_step=40, max_steps=90).save_to_json(str(folder / "trainer_state.json"))
    (folder / "args.yaml").write_text("opt: sgd\nsched: cosine\nlr: 0.05\nepochs: 5\nmomentum: 0.5\n")
    optimizer = {"type": "SGD", "params": {"lr": 0.06}}
    (folder / "ds_config.json").write_text(json.dumps({"optimizer": optimizer, "train_batch_size": 6}))
    card = REFERENCE_CARD.replace("learning_rate: 0.05", "learning_rate: 0.07")
    (folder / "README.md").write_text(card)


def test_files_are_trusted_in_order(tmp_path: Path) -> None:
    everything_beside(tmp_path)
    plain = tmp_path / "mine.yaml"
    plain.write_text("learning_rate: 0.02\nbatch_size: 2\n")
    flags = TrainingRecipe(learning_rate=0.01, sources={"learning_rate": "flag --lr"})
    found = find_recipe(tmp_path, [flags, plain])
    assert (found.learning_rate, found.sources["learning_rate"]) == (0.01, "flag --lr")
    assert (found.batch_size, found.sources["batch_size"]) == (2, "mine.yaml")
    assert (found.schedule, found.sources["schedule"]) == ("linear", "training_args.bin")
    assert (found.steps, found.sources["steps"]) == (40, "trainer_state.json")
    assert (found.epochs, found.sources["epochs"]) == (5, "args.yaml")
    assert (found.dataset_size, found.sources["dataset_size"]) == (1000, "README.md (model card)")
    # One by one the most trusted goes, and the next one is believed.
    rates = [find_recipe(tmp_path, [plain]).learning_rate]
    for name in ("training_args.bin", "args.yaml", "ds_config.json", "README.md"):
        rates.append(find_recipe(tmp_path).learning_rate)
        (tmp_path / name).unlink()
    assert rates == [0.02, 0.03, 0.05, 0.06, 0.07]
    assert find_recipe(tmp_path).learning_rate is None


def test_recipe_is_beside_a_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(REFERENCE_CARD)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_recipe(tmp_path / "model.safetensors").learning_rate == 0.05


def test_nothing_beside_the_model(tmp_path: Path) -> None:
    assert find_recipe(tmp_path) == TrainingRecipe()
    assert find_recipe(tmp_path / "none" / "model.safetensors") == TrainingRecipe()


@pytest.mark.parametrize("name", ["training_args.bin", "trainer_state.json", "args.yaml", "ds_config.json"])
def test_broken_file_beside_the_model_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    (tmp_path / "README.md").write_text(REFERENCE_CARD)
    (tmp_path / name).write_text("[")
    with caplog.at_level(logging.WARNING):
        assert find_recipe(tmp_path).learning_rate == 0.05
    assert name in caplog.text
    with pytest.raises(BadInput):
        find_recipe(tmp_path, [tmp_path / name])


def test_file_that_contradicts_the_flags_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = tmp_path / "README.md"
    card.write_text("### Training hyperparameters\n\n- warmup_steps: 50\n- learning_rate: 0.1\n")
    flags = TrainingRecipe(steps=20)
    assert find_recipe(tmp_path, [flags]) == flags
    assert "warmup_steps" in caplog.text
    with pytest.raises(BadInput, match="warmup_steps"):
        find_recipe(tmp_path, [flags, card])


def old_arguments(tmp_path: Path, **attributes: Any) -> Path:
    """A `training_args.bin` as transformers 4.5 wrote it, before there was `optim`."""
    kept = {"learning_rate": 5e-5, "weight_decay": 0.01, "local_rank": -1, "gradient_accumulation_steps": 1}
    old = arguments(tmp_path)
    old.__dict__.clear()
    old.__dict__.update(kept | {"num_train_epochs": 3.0, "per_device_train_batch_size": 8} | attributes)
    path = tmp_path / "training_args.bin"
    torch.save(old, path)
    return path


def test_old_training_arguments_are_read_whole(tmp_path: Path) -> None:
    recipe = read_training_args(old_arguments(tmp_path, adafactor=False, per_gpu_train_batch_size=16, _n_gpu=4))
    assert (recipe.optimizer, recipe.decoupled_weight_decay, recipe.batch_size) == ("adamw", True, 64)
    assert read_training_args(old_arguments(tmp_path, adafactor=True, n_gpu=2)).optimizer == "adafactor"
    assert read_training_args(old_arguments(tmp_path, adafactor=True, n_gpu=2)).batch_size == 16
    # The number of GPUs was counted when they were first used.
    assert read_training_args(old_arguments(tmp_path, adafactor=False, _n_gpu=-1)).batch_size is None
    assert read_training_args(old_arguments(tmp_path)).optimizer is None


def test_of_a_found_recipe_what_is_known_is_taken_and_the_rest_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = {"model": "mlp", "data": "digits", "init": {"std": 0.02}, "learning_rate": 0.1, "weigth_decay": 0.3}
    (tmp_path / "recipe.json").write_text(json.dumps(document | {"momentum": 3, "batch_size": 8}))
    recipe = find_recipe(tmp_path)
    assert recipe == TrainingRecipe(learning_rate=0.1, batch_size=8)
    assert recipe.sources == {"learning_rate": "recipe.json", "batch_size": "recipe.json"}
    said = caplog.text
    assert "'model', 'data', 'init'" in said
    assert "'weigth_decay'; did you mean weight_decay or" in said
    assert "momentum = 3" in said


def test_of_a_given_recipe_a_misspelled_key_is_refused_and_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"model": "mlp", "data": "digits", "learning_rate": 0.1}))
    assert read_recipe(path) == TrainingRecipe(learning_rate=0.1)
    assert "'model', 'data'" in caplog.text
    for key, meant in (("learning_rat", "learning_rate"), ("wd", "weight_decay")):
        path.write_text(json.dumps({"momentum": 0.5, key: 0.1}))
        with pytest.raises(BadInput, match=f"did you mean {meant}"):
            read_recipe(path)
    path.write_text(json.dumps({"model": "mlp"}))
    with pytest.raises(BadInput, match="holds no training hyperparameter, only 'model'"):
        read_recipe(path)


def test_the_recipe_that_is_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    for path in (tmp_path / "recipe.yaml", Path("/dev/zero")):
        with pytest.raises(BadInput, match="is not a regular file"):
            read_recipe(path)
    # Beside a model it is no file to be read.
    assert find_recipe(tmp_path) == TrainingRecipe()


def test_settings_beside_a_model(tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text("lr: 1e-3\nweight_decay: 0.05\nmax_epochs: 12\nbatch_size: 32\nwidth: 7\n")
    expected = TrainingRecipe(learning_rate=1e-3, weight_decay=0.05, epochs=12, batch_size=32)
    assert find_recipe(tmp_path) == read_recipe(tmp_path / "hparams.yaml") == expected
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "hparams.yaml").rename(tmp_path / ".hydra" / "config.yaml")
    assert find_recipe(tmp_path) == expected
    (tmp_path / ".hydra" / "config.yaml").rename(tmp_path / "hparams.yaml")
    # What ultralytics writes under the name that timm uses.
    (tmp_path / "hparams.yaml").unlink()
    (tmp_path / "args.yaml").write_text(
        "task: detect\nepochs: 100\nbatch: 16\noptimizer: SGD\nlr0: 0.01\nmomentum: 0.937\nweight_decay: 0.0005\n"
    )
    recipe = find_recipe(tmp_path)
    assert (recipe.optimizer, recipe.learning_rate, recipe.momentum) == ("sgd", 0.01, 0.937)
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (100, 16, 0.0005)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (lambda share: 1.0, ("constant", 0.003)),
        (lambda share: 1 - share, ("linear", 0.003)),
        (lambda share: 0.5 * (1 + np.cos(np.pi * share)), ("cosine", 0.003)),
        (lambda share: min(10 * share, 1 - share), (None, None)),  # a warm-up, whose peak the samples may miss
        (lambda share: (1 - share) ** 2, (None, None)),
    ],
)
@pytest.mark.parametrize("ahead", [0, 1])
def test_the_log_of_a_trainer_tells_a_schedule_that_all_its_rates_lie_on(
    tmp_path: Path, factor: Any, expected: tuple[Any, Any], *, ahead: int
) -> None:
    log = [{"step": step, "learning_rate": 0.003 * factor((step - ahead) / 1000)} for step in range(50, 1000, 50)]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"global_step": 1000, "max_steps": 1000, "log_history": [{"eval_loss": 3}, *log]}))
    recipe = read_trainer_state(path)
    assert (recipe.schedule, recipe.learning_rate) == (expected[0], expected[1] and pytest.approx(expected[1]))


def test_a_base_model_is_called_by_its_name_and_not_by_a_path_of_the_machine():
    for given, name in (("/home/me/runs/first", "first"), ("org/name", "org/name"), ("runs/first", "runs/first")):
        assert TrainingRecipe(base_model=given).base_model == name


@pytest.mark.parametrize(
    ("name", "text", "seed"),
    [
        ("args.yaml", "lr: 0.1\nopt: sgd\nseed: 7\n", 7),
        ("recipe.yaml", "learning_rate: 0.1\nseed: '18446744073709551615'\n", 2**64 - 1),
        ("config.yaml", "optimizer:\n  lr: 0.1\nseed_everything: 11\n", 11),
        ("config.yaml", "optimizer:\n  lr: 0.1\nseed_everything: true\n", None),
    ],
)
def test_the_seed_is_read_to_its_last_digit(tmp_path: Path, *, name: str, text: str, seed: int | None) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert find_recipe(tmp_path).seed == seed


@pytest.mark.parametrize("seed", [1.0, True, -1, 2**64])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(BadInput, match="seed = "):
        TrainingRecipe(seed=seed)
