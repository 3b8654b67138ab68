"""The README as a newcomer follows it: a network and a language model of one's own, compressed and evaluated.

    OMP_NUM_THREADS=1 python benchmarks/first_steps.py

It makes a convolutional network for scikit-learn's digits, and a Llama folder with two texts of the standard library's
source, in a temporary folder; neither is the project's. Then it takes the steps of README.md, each in a process of its
own, and two that have to fail: a misspelled name, and a file that was cut off. The first is what `make demo` runs.
Writes the status, the processor time, the wall time, and the output of each to benchmarks/results/first_steps.json.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "first_steps.json"

# As a newcomer writes it, with the lines of the README.
NETWORK = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
    nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(), nn.Linear(256, 10),
)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
order = torch.randperm(len(images))
seen, unseen = (TensorDataset(images[part], labels[part]) for part in (order[:1400], order[1400:]))
train_loader, test_loader = DataLoader(seen, batch_size=64, shuffle=True), DataLoader(unseen, batch_size=64)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
for _ in range(10):
    for inputs, classes in train_loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), classes).backward()
        optimizer.step()

import compressor

found = compressor.compress(network, keep=0.3, calibration=train_loader, data=test_loader)
print(found)
small = found.model
"""

LANGUAGE_MODEL = """
import argparse, tarfile
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
tokenizer = PreTrainedTokenizerFast.from_pretrained({tokenizer!r})
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
))
train, test = (Path(module.__file__).read_text()[:80_000] for module in (argparse, tarfile))
Path("train.txt").write_text(train)
Path("test.txt").write_text(test[:40_000])
tokens = torch.tensor(tokenizer(train, add_special_tokens=False)["input_ids"])
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(40):
    batch = torch.stack([tokens[at : at + 128] for at in torch.randint(len(tokens) - 128, (8,))])
    optimizer.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
model.save_pretrained("model")
tokenizer.save_pretrained("model")
"""

GENERATE = """
import compressor
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model-small/")
prompt = AutoTokenizer.from_pretrained("model-small/")("def ", return_tensors="pt", add_special_tokens=False)
assert model.generate(prompt["input_ids"], max_new_tokens=20, do_sample=False).shape[1] > 20
"""

COMPRESS = "compress model/ --keep 0.25 --calibration train.txt --data test.txt --output model-small/"
EVALUATE = "compress evaluate model-small/ --baseline model/ --data test.txt"
BROKEN, MISSING = "compress broken.safetensors --keep 0.5", "compress modle/ --keep 0.5"

DEMO, DEMO_STEP = ROOT / "examples" / "own_network.py", "`make demo`"

Found = dict[str, Any]


def step(name: str, command: list[str], folder: Path, *, expected: int = 0) -> Found:
    """Run one step, which has to end with the expected status."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    before, started = os.times(), time.perf_counter()
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    after, seconds = os.times(), time.perf_counter() - started
    sys.stderr.write(f"{name}: {ran.returncode}\n{ran.stdout}{ran.stderr[-2000:]}\n")
    if ran.returncode != expected:
        raise RuntimeError(f"{name} ended with {ran.returncode}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    said = (ran.stdout if expected == 0 else ran.stderr).strip().splitlines()
    found = {"step": name, "status": ran.returncode, "cpu_seconds": round(used, 1), "seconds": round(seconds, 1)}
    return found | {"said": [line.rstrip() for line in said]}


def walked(folder: Path) -> list[Found]:
    """All steps, in a folder that is empty."""
    python = [sys.executable, "-c"]
    rows = [step(DEMO_STEP, [sys.executable, str(DEMO), "--report", "report.html"], folder)]
    rows.append(step("train a network, `compressor.compress(network, ...)`", [*python, NETWORK], folder))
    tokenizer = str(ROOT / "model_cards" / "stdlib-llama")
    rows.append(step("train a small Llama", [*python, LANGUAGE_MODEL.format(tokenizer=tokenizer)], folder))
    rows += [step(f"`{command}`", shlex.split(command), folder) for command in (COMPRESS, EVALUATE)]
    rows.append(step("load it with transformers, and generate", [*python, GENERATE], folder))
    whole = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "broken.safetensors").write_bytes(whole[: len(whole) // 2])
    return [*rows, *(step(f"`{command}`", shlex.split(command), folder, expected=2) for command in (BROKEN, MISSING))]


def table(document: Mapping[str, Any]) -> str:
    """A row for each step: its exit status, its time, and the first line of what it found."""
    lines = ["| step | status | CPU time | wall time | says |", "|---|---|---|---|---|"]
    for row in document["rows"]:
        said = "" if row["status"] or not row["said"] else _sections(row)[0].replace("\n", " ")
        lines.append(f"| {row['step']} | {row['status']} | {_times([row])} | {said} |")
    own = [row for row in document["rows"] if row["step"] != DEMO_STEP]
    return "\n".join([*lines, f"| all | | {_times(document['rows'])} | |", f"| without the demo | | {_times(own)} | |"])


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    sums = (sum(row[each] for row in rows) for each in ("cpu_seconds", "seconds"))
    return " | ".join(f"{each:.0f} s" for each in sums)


def demo(document: Mapping[str, Any]) -> str:
    """The verdict of `make demo`, some of what it compares before and after, and what int8 and int4 would lose."""
    sections = _sections(document["rows"][0])
    header, *rows = next(each for each in sections if each.split()[:3] == ["before", "after", "compared"]).splitlines()
    shown = [row for row in rows if row.startswith(("weight files", "accuracy", "latency, batch 1"))]
    beside = next(each for each in sections if each.startswith("beside"))
    return "\n".join(["```text", sections[0], "", header, *shown, "", beside, "```"])


def _sections(row: Mapping[str, Any]) -> list[str]:
    """The parts of an output, which empty lines separate."""
    return "\n".join(row["said"]).split("\n\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = walked(Path(folder))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULT.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table({"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
