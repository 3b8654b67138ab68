"""Trains stdlib-llama from nothing: a byte-level Llama that reads the source of Python's standard library."""

from __future__ import annotations

import hashlib
import logging
import math
import platform
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from compressor.data.builtin_data import Split, standard_library_files, standard_library_text

FOLDER = Path(__file__).resolve().parent
SEED = 0
WINDOW = 256
BATCH_SIZE, STEPS, WARMUP_STEPS = 16, 3000, 150
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON = 4e-3, 0.1, (0.9, 0.95), 1e-8
MAX_GRADIENT_NORM = 1.0
END_OF_TEXT, END_OF_TEXT_ID = "<|endoftext|>", 256
UNDECAYED = "*norm*"
EVALUATION_BATCH_SIZE = 64
TRAIN_WINDOWS_PER_MEASURED = 7
CHECK_WINDOWS = 64


def build_model() -> LlamaForCausalLM:
    """Return the untrained model: four blocks of width 128, four query heads over two key-value heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
        )
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token ids are the 256 byte values of the text in UTF-8, and 256 for its end."""
    vocabulary = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def read_bytes(split: Split) -> Tensor:
    """Return the text of a split as int64 byte values, which are the token ids."""
    return torch.frombuffer(bytearray(standard_library_text(split).encode()), dtype=torch.uint8).long()


def training_tokens() -> Tensor:
    """Return the bytes of the training files, each file followed by the token for the end of a text."""
    tokens: list[int] = []
    for path in standard_library_files("train"):
        tokens += [*path.read_text(encoding="utf-8").encode(), END_OF_TEXT_ID]
    return torch.tensor(tokens)


def to_windows(tokens: Tensor) -> Tensor:
    """Cut tokens `(N,)` into `(N // 256, 256)` windows that do not overlap."""
    return tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)


@torch.inference_mode()
def nats_per_byte(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Return the mean cross-entropy over the bytes of every window but its first, which nothing predicts."""
    model.eval()
    total = 0.0
    for batch in windows.split(EVALUATION_BATCH_SIZE):
        total += float(model(input_ids=batch, labels=batch).loss.double()) * len(batch)
    return total / len(windows)


def train(model: LlamaForCausalLM, tokens: Tensor) -> None:
    """Fit the model to windows that start anywhere in the tokens `(N,)`."""
    # as the Trainer does: norms are not decayed. The tied embedding is a matrix and is.
    groups = [
        {"params": [p for name, p in model.named_parameters() if not fnmatchcase(name, UNDECAYED)]},
        {"params": [p for name, p in model.named_parameters() if fnmatchcase(name, UNDECAYED)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, STEPS)
    generator = torch.Generator().manual_seed(SEED)
    within = torch.arange(WINDOW)
    model.train()
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(tokens) - WINDOW + 1, (BATCH_SIZE, 1), generator=generator)
        batch = tokens[starts + within]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            logging.info("step %d of %d: %.3f nats/byte", step, STEPS, loss.item())


def describe(nats: dict[str, float], check: float) -> None:
    """Write the card: the cross-entropy of every split, and that of the first windows of the test for a quick check."""
    sys.path.append(str(FOLDER.parent))
    from card import Card, Result, write_card

    sizes = {split: len(read_bytes(split)) for split in nats}
    model = build_model()
    write_card(
        FOLDER,
        Card(
            name=FOLDER.name,
            summary=f"""
A byte-level Llama with grouped-query attention and tied embeddings, trained from nothing on the source code of the
standard library of Python {platform.python_version()}.
""",
            intended_use="""
A reference for compressing language models: small enough to train, compress and evaluate anywhere, trained well enough
that every layer matters. It continues Python source in the style of the standard library and is of no other use.
""",
            data=f"""
The pure-Python source of the standard library, without its tests; `compressor.data.builtin_data` splits it by
file into {sizes["train"]:,} bytes for training, {sizes["validation"]:,} for validation and {sizes["test"]:,} for the
test. The text belongs to the Python version: with another one the figures differ. A token is a byte; perplexity is per
byte, over windows of {WINDOW} bytes that do not overlap, of which the first byte is not predicted. The figure for the
training split is over every {TRAIN_WINDOWS_PER_MEASURED}th of its windows.
""",
            task="text-generation",
            dataset=("builtin:stdlib", f"source of the Python {platform.python_version()} standard library"),
            libraries=("transformers", "torch", "tokenizers"),
            tags=("llama", "byte-level", "python", "reference-model"),
            hyperparameters={
                "learning_rate": LEARNING_RATE,
                "train_batch_size": BATCH_SIZE,
                "eval_batch_size": EVALUATION_BATCH_SIZE,
                "seed": SEED,
                "gradient_accumulation_steps": 1,
                "total_train_batch_size": BATCH_SIZE,
                "optimizer": f"Use OptimizerNames.ADAMW_TORCH with betas=({BETAS[0]},{BETAS[1]}) and "
                f"epsilon={EPSILON} and optimizer_args=No additional optimizer arguments",
                "lr_scheduler_type": "cosine",
                "lr_scheduler_warmup_steps": WARMUP_STEPS,
                "training_steps": STEPS,
                "weight_decay": WEIGHT_DECAY,
                "max_grad_norm": MAX_GRADIENT_NORM,
                "dataset_size": sizes["train"] // WINDOW,
                "sequence_length": WINDOW,
                "undecayed": UNDECAYED,
            },
            results=(
                Result("perplexity", "perplexity per byte", *map(math.exp, nats.values()), digits=3),
                Result("cross_entropy", "nats per byte", *nats.values(), digits=4),
            ),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            notes="""
The token for the end of a text follows every file in training, and is not in the text that was evaluated. Weight decay
acts on the matrices, the tied embedding among them, and not on the norms.
""",
        ),
        extra_figures={
            "python": platform.python_version(),
            "test_text_sha256": hashlib.sha256(standard_library_text("test").encode()).hexdigest(),
            f"nats_per_byte_first_{CHECK_WINDOWS}_test_windows": check,
        },
    )


def main() -> None:
    """Train, measure, and write the folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    model = build_model()
    train(model, training_tokens())
    model.save_pretrained(FOLDER)
    build_tokenizer().save_pretrained(FOLDER)
    (FOLDER / "model.safetensors").chmod(0o644)  # safetensors writes 0600

    windows = {split: to_windows(read_bytes(split)) for split in get_args(Split)}
    # evenly spread: all of them would take minutes
    windows["train"] = windows["train"][::TRAIN_WINDOWS_PER_MEASURED]
    describe(
        {split: nats_per_byte(model, each) for split, each in windows.items()},
        check=nats_per_byte(model, windows["test"][:CHECK_WINDOWS]),
    )


if __name__ == "__main__":
    main()
