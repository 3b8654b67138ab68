"""Runs that are killed again and again, and go on from their work folder: whether they end with the same bytes.

    OMP_NUM_THREADS=1 python benchmarks/interruptions.py [--kills 50] [--seed 0] [--cases CASE ...]

A Llama of random weights is compressed into a folder, by its weights alone and calibrated with the most effort. The
process is killed with SIGKILL at random moments, and started again with the same command, until so many kills were
given; each model that is completed on the way is compared with that of a run nobody interrupted, file by file but for
the card, which states times. What a killed run leaves behind is counted when the next one has ended.

Writes benchmarks/results/interruptions.json, and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.llama import modeling_llama  # noqa: F401 - here, and not in every process again

from compressor import compress
from compressor.io import CARD_FILE

RESULT = Path(__file__).parent / "results" / "interruptions.json"
TOKENS = 96


def calibration() -> list[dict[str, torch.Tensor]]:
    """Texts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, TOKENS, (4, 16), generator=generator)} for _ in range(4)]


CASES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "data-free": lambda: {"keep": 0.5, "calibration": "none", "prefer": "size", "max_shard_size": "20KB"},
    "calibrated": lambda: {"keep": 0.5, "calibration": calibration(), "effort": "best", "prefer": "size", "bits": 16},
}


def write_model(folder: Path) -> None:
    """A Llama of three blocks with random weights, large enough for every block to matter."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@dataclass(frozen=True)
class Subject:
    """What is compressed, in a folder of its own that also takes the temporary files."""

    folder: Path
    case: str

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def compress(self, *, kept: bool = True) -> None:
        work = {"work_dir": self.work} if kept else {}
        compress(self.folder / "model", output=self.output, device="cpu", **work, **CASES[self.case]())

    def files(self) -> dict[str, bytes]:
        """What was written, but for the card."""
        return {each.name: each.read_bytes() for each in self.output.iterdir() if each.name != CARD_FILE}

    def left(self) -> list[str]:
        """What lies beside the model and its output."""
        expected = {"model", "output", "temporary", "errors.txt"}
        beside = [each.name for each in self.folder.iterdir() if each.name not in expected]
        return beside + [each.name for each in (self.folder / "temporary").iterdir()]


def process(run: Callable[[], None], folder: Path) -> int:
    """Run something in a process of its own, and return its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        tempfile.tempdir = str(folder / "temporary")
        with (folder / "errors.txt").open("w") as errors:
            os.dup2(errors.fileno(), 2)
            try:
                run()
                status = 0
            except BaseException:
                traceback.print_exc(file=errors)
    finally:
        os._exit(status)


def ended(child: int, seconds: float | None) -> int | None:
    """The status of a process that ends within so many seconds; None for one that is killed then."""
    if seconds is not None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


def interrupted(case: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill runs of a case so often: how many models were completed on the way, and whether all are the same."""
    with tempfile.TemporaryDirectory() as place:
        subject, moments = Subject(Path(place), case), random.Random(f"{seed} {case}")
        (subject.folder / "temporary").mkdir()
        if ended(process(lambda: write_model(subject.folder / "model"), subject.folder), None) != 0:
            raise RuntimeError((subject.folder / "errors.txt").read_text())
        started = time.monotonic()
        if ended(process(lambda: subject.compress(kept=False), subject.folder), None) != 0:
            raise RuntimeError((subject.folder / "errors.txt").read_text())
        whole = time.monotonic() - started
        expected, given, completed, different = subject.files(), 0, 0, 0
        left: set[str] = set()
        shutil.rmtree(subject.output)
        while given < kills:
            # Starting takes a part of it. Less than a run, which so is interrupted several times.
            seconds = moments.uniform(0, 0.4 + 0.6 * whole)
            status = ended(process(subject.compress, subject.folder), seconds if given < kills else None)
            given += status is None
            if given == kills and status is None:
                status = ended(process(subject.compress, subject.folder), None)
            if status is None:
                continue
            # One that was killed when its output was in place already refuses to replace it.
            if status != 0 and not subject.output.exists():
                raise RuntimeError((subject.folder / "errors.txt").read_text())
            completed += 1
            different += subject.files() != expected
            left |= set(subject.left())
            shutil.rmtree(subject.output)
        return {
            "case": case,
            "kills": given,
            "completed": completed,
            "different": different,
            "left_behind": sorted(left),
            "seconds_uninterrupted": round(whole, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    result = {
        "cases": [interrupted(case, asked.kills, asked.seed) for case in asked.cases],
        "seed": asked.seed,
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    asked.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
