"""What each effort of the calibration costs in time, and wins in loss.

    OMP_NUM_THREADS=1 python benchmarks/effort.py [--models MODEL ...] [--keeps 0.6 ...] [--seeds 0 ...]
                                                  [--settings NAME ...]

Compresses reference models at several sizes, three draws of calibration data each, with `effort` fast, balanced and
best; and with the settings of fast but another exponent of the allocation, for which these rows are the reason. For
every cell: the processor's seconds that `compress` took, in one thread; the loss that its plan states on the holdout
quarter of the calibration data, against the dense model's own predictions; and the increase in loss on the test split.
Both are in nats per prediction.

What is measured replaces the same cells of benchmarks/results/effort.json and leaves the others as they are. Prints
the table of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import SUBJECTS, opened

from compressor import CalibrationSettings, compress
from compressor.evaluation import measure_quality
from compressor.model import load_model

RESULT = Path(__file__).parent / "results" / "effort.json"
MODELS = ("digits-resnet", "digits-vit", "stdlib-llama")
KEEPS = (0.8, 0.6, 0.5)
SEEDS = (0, 1, 2)
OTHER_EXPONENTS = (1.0, 0.5)
BATCH_SIZE = 16

FAST = CalibrationSettings.of("fast")
SETTINGS = {
    **{f"fast, but p = {exponent:g}": replace(FAST, exponents=(exponent,)) for exponent in OTHER_EXPONENTS},
    "fast": FAST,
    "balanced": CalibrationSettings.of("balanced"),
    "best": CalibrationSettings.of("best"),
}
CELL = ("model", "keep", "seed", "settings")


def measured(
    name: str, names: Sequence[str], *, keeps: Sequence[float], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """One model: a row for each size, seed and settings."""
    subject = SUBJECTS[name]
    model = load_model(subject.weights, subject.factory).eval()
    train, test = opened(name, "train", None), opened(name, "test", subject.test_examples)
    dense = measure_quality(model, test).loss
    assert dense is not None
    for keep, seed in ((keep, seed) for keep in keeps for seed in seeds):
        chosen = torch.randperm(train.count, generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = chosen[: subject.calibration_examples]
        batches = [train.read(chosen[start : start + BATCH_SIZE]).inputs for start in range(0, len(chosen), BATCH_SIZE)]
        for settings in names:
            started = time.process_time()
            small = compress(
                model,
                keep=keep,
                calibration=batches,
                seed=seed,
                calibration_settings=SETTINGS[settings],
                prefer="size",
                bits=16,
            )
            seconds = time.process_time() - started
            assert small.model is not None
            assert small.plan.calibration is not None
            loss = measure_quality(small.model, test).loss
            assert loss is not None
            row = {"model": name, "keep": keep, "seed": seed, "settings": settings, "cpu_seconds": round(seconds, 2)}
            row |= {"holdout_loss": small.plan.calibration.holdout_loss, "loss_increase": loss - dense}
            sys.stderr.write(f"{row}\n")
            yield row


def put(row: Mapping[str, Any]) -> dict[str, Any]:
    """Put a row in the place of the same cell of the results, in a fixed order; write and return all of them."""
    known = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    cells = {tuple(each[key] for key in CELL): dict(each) for each in [*known, row]}
    order = list(SETTINGS)
    ordered = sorted(
        cells.values(), key=lambda row: (row["model"], -row["keep"], order.index(row["settings"]), row["seed"])
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    document = {"versions": versions, "rows": ordered}
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def table(document: Mapping[str, Any]) -> str:
    """Per model and size: median seconds, and the means of the holdout loss and of the loss increase on the test."""
    rows = document["rows"]
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    lines = [
        "| model | effort | " + " | ".join(f"keep {keep}" for keep in keeps) + " |",
        "|---" * (2 + len(keeps)) + "|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        for settings in SETTINGS:
            cells = [
                summary(
                    [row for row in rows if (row["model"], row["keep"], row["settings"]) == (model, keep, settings)]
                )
                for keep in keeps
            ]
            if any(cells):
                lines.append(f"| {model} | {settings} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """One cell: seconds; holdout loss; loss increase on the test split, from least to most."""
    if not rows:
        return ""
    seconds = statistics.median(row["cpu_seconds"] for row in rows)
    holdout = statistics.mean(row["holdout_loss"] for row in rows)
    increases = [row["loss_increase"] for row in rows]
    test = f"{statistics.mean(increases):.3f} ({min(increases):.3f} to {max(increases):.3f})"
    fewer = "" if len(rows) == len(SEEDS) else f"; {len(rows)} of {len(SEEDS)} draws"
    return f"{seconds:.1f} s; {holdout:.2g}; {test}{fewer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--keeps", nargs="+", type=float, default=KEEPS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    document = {}
    for name in asked.models:
        for row in measured(name, asked.settings, keeps=asked.keeps, seeds=asked.seeds):
            document = put(row)
    sys.stdout.write(table(document) + "\n")


if __name__ == "__main__":
    main()
