"""The callback of the Trainer: what it keeps of a run's start is found, and is what the weights started from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import compressor
from compressor import KeepInitial
from compressor.initial import find_kept, read_kept, starts_of
from compressor.model import open_model

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=16,
)


def arguments(run: Path, **given: Any) -> TrainingArguments:
    common = {"max_steps": 3, "save_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(run), per_device_train_batch_size=4, learning_rate=1e-3, **(common | given))


def train(run: Path, model: Any, callback: KeepInitial, *, resume: bool = False, **given: Any) -> Trainer:
    tokens = torch.randint(32, (12, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": each, "labels": each} for each in tokens]
    trainer = Trainer(model, arguments(run, **given), train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def llama(seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    return LlamaForCausalLM(CONFIG)


@pytest.fixture(autouse=True)
def _own_generators():
    with torch.random.fork_rng(devices=()):
        yield


def require_starts(run: Path, initial: Path) -> None:
    """All layers of the last checkpoint correlate with what was kept."""
    model = open_model(run / "checkpoint-3")
    eligible = [layer for layer in model.layers if layer.eligible]
    starts = starts_of(eligible, model.checkpoint, read_kept(initial))
    assert len(starts) == len(eligible) > 0
    assert all(start.z > 20 for start in starts.values())


@pytest.mark.slow
def test_a_seed_that_was_set_before_the_model_was_built_is_kept_as_a_record(tmp_path: Path) -> None:
    model = llama(7)
    expected = {name: each.clone() for name, each in model.state_dict().items()}
    train(tmp_path, model, KeepInitial(), seed=3)
    kept = find_kept(tmp_path / "checkpoint-3")
    assert kept == tmp_path / "initial" / "draws.json"
    assert kept.stat().st_size < 15_000
    initial = read_kept(kept)
    assert initial.draws is not None
    assert initial.draws.seed == 7
    for name, each in expected.items():
        if each.dim() >= 2:
            assert torch.equal(initial.read(name), each)
    require_starts(tmp_path, kept)


@pytest.mark.slow
def test_the_seed_of_the_arguments_is_kept_where_the_trainer_builds_the_model(tmp_path: Path) -> None:
    callback = KeepInitial()
    trainer = Trainer(
        args=arguments(tmp_path, seed=11),
        model_init=lambda: AutoModelForCausalLM.from_config(CONFIG),
        train_dataset=[{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4,
        callbacks=[callback],
    )
    trainer.train()
    kept = find_kept(tmp_path / "checkpoint-3")
    assert kept is not None
    assert read_kept(kept).source == "seed 11"
    require_starts(tmp_path, kept)


@pytest.mark.slow
def test_the_state_is_kept_where_no_seed_gives_the_model(tmp_path: Path) -> None:
    model = llama(7)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    expected = model.lm_head.weight.detach().clone()
    train(tmp_path, model, KeepInitial(seed=7))
    kept = find_kept(tmp_path / "checkpoint-3")
    assert kept == tmp_path / "initial" / "model.safetensors"
    assert torch.equal(read_kept(kept).read("lm_head.weight"), expected)
    require_starts(tmp_path, kept)


@pytest.mark.slow
def test_a_resumed_run_keeps_what_it_has_and_another_run_replaces_it(tmp_path: Path) -> None:
    train(tmp_path, llama(7), KeepInitial())
    kept = find_kept(tmp_path)
    assert kept is not None
    before = kept.read_bytes()
    train(tmp_path, llama(8), KeepInitial(), resume=True, max_steps=4)
    assert find_kept(tmp_path) == kept
    assert kept.read_bytes() == before
    train(tmp_path, llama(9), KeepInitial())
    assert read_kept(kept).source == "seed 9"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7, None])
def test_a_checkpoint_is_compressed_to_what_training_wrote(tmp_path: Path, seed: int | None) -> None:
    model = llama(7)
    if seed is None:
        model.lm_head.weight.data.mul_(0.5)
    trainer = train(tmp_path / "run", model, KeepInitial())
    kept = find_kept(tmp_path / "run" / "checkpoint-3")
    # The plan is for size: so small a model is not made faster.
    asked = {"keep": 0.3, "prefer": "size", "calibration": "none", "output": tmp_path / "small"}
    small = compressor.compress(tmp_path / "run" / "checkpoint-3", initial=kept, **asked)
    assert small.initial is not None
    assert small.initial.seed == seed
    assert len(small.initial.layers) == small.initial.eligible
    given = {} if seed is not None else {"initial": kept}
    loaded = compressor.load_model(tmp_path / "small", **given)
    plain = compressor.compress(trainer.model, keep=0.3, prefer="size", calibration="none").model
    tokens = torch.arange(8)[None]
    expected, found, without = (each.eval()(tokens).logits for each in (trainer.model, loaded, plain))
    assert (found - expected).norm() < 0.2 * (without - expected).norm()
