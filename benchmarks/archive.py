"""What an archive of a run takes beside its files and beside zstd of their differences, and what it restores.

    OMP_NUM_THREADS=1 python benchmarks/archive.py

Needs `pip install 'compressor[benchmarks]'`. Trains a perceptron by SGD with momentum and a vision transformer by AdamW
on the digits, and the perceptron for few steps by plain SGD at batch 2, where the memory window bounds the rank of
every change; each has 20 checkpoints. Writes benchmarks/results/archive.json and prints its tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from initial_networks import BUILDERS, OPTIMIZERS, Optimizer, logits_of, quality, split_of
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

import compressor
from compressor import TrainingRecipe

RESULT = Path(__file__).parent / "results" / "archive.json"
TOLERANCES = (0.0, 1e-4, 1e-3, 1e-2)
LEVEL = 9
SEED = 0


@dataclass(frozen=True)
class Run:
    """A training with a checkpoint after every `every` steps."""

    name: str
    network: str
    optimizer: Optimizer
    batch: int
    every: int
    count: int = 20
    warmup: int = 0

    @property
    def steps(self) -> int:
        return self.every * self.count

    def recipe(self) -> TrainingRecipe:
        """How it is trained, as the tool reads it."""
        known = self.optimizer.recipe(BUILDERS[self.network](), epochs=1)
        uses = 1 if self.network == "perceptron" else None
        return replace(known, batch_size=self.batch, steps=self.steps, warmup_steps=self.warmup, sequence_length=uses)

    def checkpoints(self, folder: Path) -> list[Path]:
        """Train it, and write its checkpoints."""
        torch.manual_seed(SEED)
        model = BUILDERS[self.network]().train()
        stepper = self.optimizer.over(model)
        schedule = get_cosine_schedule_with_warmup(stepper, self.warmup, self.steps)
        written = []
        for step, (images, labels) in enumerate(self.batches(), start=1):
            stepper.zero_grad()
            nn.functional.cross_entropy(logits_of(model, images), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            stepper.step()
            schedule.step()
            if step % self.every == 0:
                written.append(folder / f"checkpoint-{step}.safetensors")
                save_file({name: each.clone() for name, each in model.state_dict().items()}, written[-1])
        return written

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Examples in an order that is drawn anew for each pass."""
        images, labels = split_of("train")
        order = torch.Generator().manual_seed(SEED)
        left: list[Tensor] = []
        for _ in range(self.steps):
            left = left or list(torch.randperm(len(labels), generator=order).split(self.batch))
            rows = left.pop()
            yield images[rows], labels[rows]


RUNS = (
    Run("SGD with momentum", "perceptron", OPTIMIZERS["SGD, momentum, decay"], batch=32, every=34, warmup=34),
    Run("AdamW", "vision transformer", OPTIMIZERS["AdamW"], batch=32, every=34, warmup=34),
    Run("plain SGD, batch 2", "perceptron", Optimizer("sgd", 0.05, 5e-4, momentum=0.0), batch=2, every=8),
)


def by_significance(data: bytes, size: int = 4) -> bytes:
    """The first bytes of all numbers, then the second ones, and so on."""
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, size).T.tobytes()


def numbers(state: Mapping[str, Tensor]) -> bytes:
    """The numbers of a checkpoint of one dtype, in the order of their names."""
    return b"".join(state[name].numpy().tobytes() for name in sorted(state))


def exclusive_or(first: bytes, second: bytes) -> bytes:
    return (np.frombuffer(first, dtype=np.uint8) ^ np.frombuffer(second, dtype=np.uint8)).tobytes()


def compressed_bytes(data: bytes) -> int:
    return len(zstandard.ZstdCompressor(level=LEVEL).compress(data))


def alternatives(files: list[Path]) -> dict[str, int]:
    """Bytes of what else could be kept of the checkpoints."""
    states = [load_file(file) for file in files]
    raw = [numbers(state) for state in states]
    differences = [raw[0], *(exclusive_or(now, before) for before, now in pairwise(raw))]
    short = [numbers({name: each.bfloat16().view(torch.int16) for name, each in state.items()}) for state in states]
    halves = [short[0], *(exclusive_or(now, before) for before, now in pairwise(short))]
    return {
        "safetensors": sum(file.stat().st_size for file in files),
        "bfloat16": sum(len(save({name: each.bfloat16() for name, each in state.items()})) for state in states),
        "zstd of the files": sum(compressed_bytes(file.read_bytes()) for file in files),
        "zstd of differences": sum(map(compressed_bytes, differences)),
        "zstd of differences by significance": sum(compressed_bytes(by_significance(each)) for each in differences),
        "zstd of bfloat16 differences by significance": sum(
            compressed_bytes(by_significance(each, 2)) for each in halves
        ),
    }


def rounding_error(files: list[Path]) -> float:
    """The largest relative error of a matrix that is rounded to bfloat16."""
    matrices = (each for file in files for each in load_file(file).values() if each.dim() > 1)
    return max(float((each.bfloat16().double() - each.double()).norm() / each.double().norm()) for each in matrices)


def qualities(run: Run, files: list[Path]) -> list[tuple[float, float]]:
    """Accuracy and loss of each checkpoint on the test split."""
    return [quality(compressor.load_model(file, BUILDERS[run.network]).eval()) for file in files]


def measured(run: Run, files: list[Path], folder: Path, *, tolerance: float) -> dict[str, Any]:
    """An archive at a tolerance: its bytes, and what each restored checkpoint is worth."""
    archive = folder / f"archive-{tolerance:g}"
    archived = compressor.archive(
        files,
        output=archive,
        tolerance=tolerance,
        recipe=run.recipe(),
        initial=SEED,
        factory=BUILDERS[run.network],
        overwrite=True,
    )
    started = time.perf_counter()
    again = [folder / f"again-{file.name}" for file in files]
    for file, place in zip(files, again, strict=True):
        compressor.restore(archive, checkpoint=file.name, output=place, overwrite=True)
    seconds = time.perf_counter() - started
    return {
        "tolerance": tolerance,
        "bytes": archived.bytes.after,
        "seconds": archived.seconds,
        "seconds_to_restore_all": seconds,
        "checkpoints": [each.to_dict() for each in archived.checkpoints],
        "qualities": qualities(run, again),
    }


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """A run, its archives, and what else could be kept of it."""
    folder.mkdir(parents=True)
    files = run.checkpoints(folder)
    found = [measured(run, files, folder, tolerance=tolerance) for tolerance in TOLERANCES]
    without_seed = compressor.archive(
        files, output=folder / "without", recipe=run.recipe(), factory=BUILDERS[run.network]
    )
    return {
        "name": run.name,
        "network": run.network,
        "steps": run.steps,
        "checkpoints": len(files),
        "bytes": alternatives(files),
        "bfloat16_error": rounding_error(files),
        "bytes_without_seed": without_seed.bytes.after,
        "qualities": qualities(run, files),
        "archives": found,
    }


def sizes_table(document: Mapping[str, Any]) -> str:
    """Bytes of the archives and of the alternatives, beside those of the safetensors files."""
    runs = document["runs"]
    lines = ["| | " + " | ".join(f"{run['network']}, {run['name']}" for run in runs) + " |"]
    lines.append("|---" * (len(runs) + 1) + "|")

    def row(words: str, size_of: Callable[[Mapping[str, Any]], int]) -> str:
        cells = [f"{size_of(run) / 1e6:.2f} MB, {size_of(run) / run['bytes']['safetensors']:.1%}" for run in runs]
        return f"| {words} | " + " | ".join(cells).replace("%", " %") + " |"

    lines.append(row("20 safetensors files", lambda run: run["bytes"]["safetensors"]))
    errors = [run["bfloat16_error"] for run in runs]
    lines.append(row(f"bfloat16, error {100 * max(errors):.2f} %", lambda run: run["bytes"]["bfloat16"]))
    for name in list(runs[0]["bytes"])[2:]:
        lines.append(row(name, lambda run, name=name: run["bytes"][name]))
    for place, archive in enumerate(runs[0]["archives"]):
        words = (
            "archive, every bit" if not archive["tolerance"] else f"archive, tolerance {100 * archive['tolerance']:g} %"
        )
        lines.append(row(words, lambda run, place=place: run["archives"][place]["bytes"]))
    lines.append(row("archive, tolerance 0.1 %, without the seed", lambda run: run["bytes_without_seed"]))
    return "\n".join(lines)


def quality_table(document: Mapping[str, Any]) -> str:
    """The largest change of a restored checkpoint's loss and accuracy, and the ranks."""
    lines = [
        "| run | tolerance | largest error | largest change in loss | in accuracy, points | largest rank | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in document["runs"]:
        for archive in run["archives"]:
            pairs = list(zip(run["qualities"], archive["qualities"], strict=True))
            accuracy = max(100 * abs(after[0] - before[0]) for before, after in pairs)
            loss = max(abs(after[1] - before[1]) for before, after in pairs)
            stored = archive["checkpoints"]
            largest = max(each["largest_rank"] for each in stored[1:])
            bounds = {each["rank_bound"] for each in stored[1:]} - {None}
            lines.append(
                f"| {run['network']}, {run['name']} | {100 * archive['tolerance']:g} % "
                f"| {max(each['error'] for each in stored):.1e} | {loss:.1e} | {accuracy:.2f} "
                f"| {largest or '-'} | {max(bounds) if bounds else '-'} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", choices=[run.name for run in RUNS], help="others stay as they were measured"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "zstandard": zstandard.__version__}
    for run in RUNS:
        if asked.runs and run.name not in asked.runs:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measure(run, Path(folder) / "run") | versions
        before = json.loads(asked.output.read_text(encoding="utf-8"))["runs"] if asked.output.exists() else []
        known = {each["name"]: each for each in before} | {run.name: found}
        document = {"level": LEVEL, "runs": [known[each.name] for each in RUNS if each.name in known]}
        asked.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    document = json.loads(asked.output.read_text(encoding="utf-8"))
    sys.stdout.write(f"{sizes_table(document)}\n\n{quality_table(document)}\n")


if __name__ == "__main__":
    main()
