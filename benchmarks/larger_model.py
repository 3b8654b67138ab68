"""Trains one larger language model from nothing for the benchmarks to compress: a byte-level Llama, grouped queries.

    python benchmarks/larger_model.py [--device cpu|cuda]

It reads what stdlib-llama reads, the source of the running interpreter's standard library, and has eight times as many
parameters (thirty times on a GPU). One core with bfloat16 matrix units takes about three quarters of an hour. Writes
the transformers folder benchmarks/models/stdlib-llama-large, which git ignores, with `training.json` in it: the
configuration, the loss on each split and the time. A run that was interrupted goes on where its last checkpoint is.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "model_cards" / "stdlib-llama"
FOLDER = ROOT / "benchmarks" / "models" / "stdlib-llama-large"
CHECKPOINT = FOLDER.with_name("stdlib-llama-large.checkpoint.pt")

sys.path.append(str(CARD))
from train import END_OF_TEXT_ID, WINDOW, nats_per_byte, read_bytes, to_windows, training_tokens  # noqa: E402

SEED = 0
BETAS, WEIGHT_DECAY, MAX_GRADIENT_NORM = (0.9, 0.95), 0.1, 1.0
CHECKPOINT_EVERY = 100
TEST_WINDOWS_PER_MEASURED = 4


@dataclass(frozen=True)
class Training:
    """What is trained and how; `steps` batches of `batch_size` windows of 256 bytes."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    key_value_heads: int
    batch_size: int
    steps: int
    warmup_steps: int
    learning_rate: float


ONE_CORE = Training(384, 1024, 4, 6, 2, batch_size=16, steps=2000, warmup_steps=100, learning_rate=2e-3)
ONE_GPU = Training(512, 1408, 8, 8, 2, batch_size=64, steps=4000, warmup_steps=200, learning_rate=1.5e-3)


def build_model(training: Training) -> LlamaForCausalLM:
    """Return the untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=END_OF_TEXT_ID + 1,
            hidden_size=training.hidden,
            intermediate_size=training.intermediate,
            num_hidden_layers=training.blocks,
            num_attention_heads=training.heads,
            num_key_value_heads=training.key_value_heads,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
        )
    )


def train(model: LlamaForCausalLM, tokens: Tensor, training: Training) -> float:
    """Fit the model to windows that start anywhere in the tokens `(N,)`, and return the seconds it took."""
    device = model.device
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, training.warmup_steps, training.steps)
    # All drawn at once, so that a run that goes on later sees what one in a single piece sees.
    starts = torch.randint(
        len(tokens) - WINDOW + 1,
        (training.steps, training.batch_size, 1),
        generator=torch.Generator().manual_seed(SEED),
    )
    within = torch.arange(WINDOW)
    done, before = 0, 0.0
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT, weights_only=True, map_location=device)
        if saved["training"] == asdict(training):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            done, before = saved["step"], saved["seconds"]
            logging.info("going on after step %d", done)
    started = time.monotonic() - before
    model.train()
    for step in range(done + 1, training.steps + 1):
        batch = tokens[starts[step - 1] + within].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % CHECKPOINT_EVERY == 0:
            seconds = time.monotonic() - started
            logging.info("step %d of %d: %.3f nats/byte, %.0f s", step, training.steps, loss.item(), seconds)
            state = {
                "training": asdict(training),
                "step": step,
                "seconds": seconds,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            unfinished = CHECKPOINT.with_suffix(".unfinished")
            torch.save(state, unfinished)
            unfinished.replace(CHECKPOINT)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    training = ONE_GPU if device.type == "cuda" else ONE_CORE
    torch.manual_seed(SEED)
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = build_model(training)
    model.to(device)
    seconds = train(model, training_tokens(), training)
    model.save_pretrained(FOLDER)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CARD / name, FOLDER / name)
    loss = {
        split: nats_per_byte(model.cpu(), to_windows(read_bytes(split))[::TEST_WINDOWS_PER_MEASURED])
        for split in ("validation", "test")
    }
    document = {
        "training": asdict(training) | {"window": WINDOW, "weight_decay": WEIGHT_DECAY, "optimizer": "AdamW"},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": training.steps * training.batch_size * WINDOW,
        "nats_per_byte": loss,
        "measured": f"every {TEST_WINDOWS_PER_MEASURED}th window of {WINDOW} bytes",
        "seconds": round(seconds),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (FOLDER / "training.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    CHECKPOINT.unlink(missing_ok=True)
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
