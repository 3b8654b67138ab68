"""Peak memory and time of calibration against the number of blocks of a model and the number of samples.

    python benchmarks/calibration_cost.py [--blocks 2 4 8 16] [--samples 16 32 64 128]

Plans random Llamas of a fixed width with `compressor.plan(folder, calibration=..., keep=0.5)`, with the refinement and
without, each in a process of its own with one thread; blocks are varied at 32 samples, samples at 4 blocks. A sample is
a window of 256 bytes. What the model takes without being calibrated is measured likewise and taken off:
`beyond_model_bytes` is the peak resident size minus that of a process that only loads the model and runs one sample,
and `cpu_seconds` the processor's time minus that of the same plan without calibration; `refined` and `unrefined` have
one of each. Writes benchmarks/results/calibration_cost.json with straight lines fitted by least squares, and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

import compressor
from compressor import CalibrationSettings
from compressor.data.builtin_data import standard_library_text
from compressor.model import load_transformers, logits_of

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "calibration_cost.json"
TOKENIZER = ROOT / "model_cards" / "stdlib-llama"
HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, WINDOW = 256, 704, 4, 2, 256
BLOCKS, SAMPLES = (2, 4, 8, 16), (16, 32, 64, 128)
FIXED_BLOCKS, FIXED_SAMPLES = 4, 32
KEEP = 0.5

Step = Literal["load", "plan", "unrefined", "refined"]
PLANNED: tuple[Step, ...] = ("unrefined", "refined")


def make_model(folder: Path, blocks: int) -> None:
    """Write a random byte-level Llama with the tokenizer of stdlib-llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


def take(step: Step, folder: Path, text: Path, *, samples: int) -> dict[str, float]:
    """One step, in this process: the processor's seconds, and the peak resident size so far in bytes."""
    started = time.process_time()
    if step == "load":
        with torch.no_grad():
            logits_of(load_transformers(folder), {"input_ids": torch.zeros(1, WINDOW, dtype=torch.int64)})
    elif step == "plan":
        compressor.plan(folder, keep=KEEP, calibration="none", prefer="size")
    else:
        settings = CalibrationSettings(refine=step == "refined")
        compressor.plan(
            folder,
            keep=KEEP,
            calibration=text,
            calibration_samples=samples,
            calibration_settings=settings,
            prefer="size",
            bits=16,
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "cpu_seconds": time.process_time() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def in_fresh_process(step: Step, folder: Path, text: Path, *, samples: int) -> dict[str, float]:
    """One step in a process of its own, with one thread."""
    command = [sys.executable, str(Path(__file__).resolve()), "--step", step, str(folder), str(text), str(samples)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def measured(scratch: Path, blocks: int, sample_counts: Sequence[int]) -> list[dict[str, Any]]:
    """One model, calibrated with several numbers of samples."""
    folder = scratch / f"{blocks}-blocks"
    if not folder.exists():
        make_model(folder, blocks)
    loaded, planned = (in_fresh_process(step, folder, scratch / "none", samples=0) for step in ("load", "plan"))
    rows = []
    for samples in sample_counts:
        text = scratch / f"{samples}-samples.txt"
        text.write_bytes(standard_library_text("train").encode()[: samples * WINDOW])
        row: dict[str, Any] = {"blocks": blocks, "samples": samples}
        row["model_bytes"] = (folder / "model.safetensors").stat().st_size
        for step in PLANNED:
            calibrated = in_fresh_process(step, folder, text, samples=samples)
            row[step] = {
                "cpu_seconds": round(calibrated["cpu_seconds"] - planned["cpu_seconds"], 2),
                "beyond_model_bytes": calibrated["peak_bytes"] - loaded["peak_bytes"],
            }
        rows.append(row)
    return rows


def line(rows: Sequence[dict[str, Any]], against: str, step: Step, *, what: str) -> dict[str, float]:
    """The straight line of least squares, and the share of the variance that it explains."""
    x, y = (
        np.array(each, dtype=float) for each in zip(*((row[against], row[step][what]) for row in rows), strict=True)
    )
    slope, intercept = np.polyfit(x, y, 1)
    residual, total = np.square(y - slope * x - intercept).sum(), np.square(y - y.mean()).sum()
    return {"slope": slope, "intercept": intercept, "r_squared": 1 - residual / total if total else 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=BLOCKS)
    parser.add_argument("--samples", nargs="+", type=int, default=SAMPLES)
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)  # what the processes are started with
    asked = parser.parse_args()
    if asked.step:
        step, folder, text, samples = asked.step
        sys.stdout.write(json.dumps(take(step, Path(folder), Path(text), samples=int(samples))))
        return
    scratch = Path(tempfile.mkdtemp())
    try:
        by_blocks = [row for blocks in asked.blocks for row in measured(scratch, blocks, [FIXED_SAMPLES])]
        by_samples = measured(scratch, FIXED_BLOCKS, asked.samples)
    finally:
        shutil.rmtree(scratch)
    lines = {
        f"{step}, {what} by {against}": line(rows, against, step, what=what)
        for rows, against in ((by_blocks, "blocks"), (by_samples, "samples"))
        for step in PLANNED
        for what in ("cpu_seconds", "beyond_model_bytes")
    }
    document = {
        "model": f"Llama, hidden {HIDDEN}, intermediate {INTERMEDIATE}, float32, windows of {WINDOW} bytes",
        "by_blocks": by_blocks,
        "by_samples": by_samples,
        "lines": lines,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
