"""What calibration on examples that the model makes itself wins, beside none and beside real data.

    OMP_NUM_THREADS=1 python benchmarks/self_calibration.py [--models MODEL ...] [--keeps 0.8 ...] [--seeds 0 ...]
                                                            [--sources none ...] [--effort best] [--processes 2]

Compresses every reference model at two sizes: by its weights alone, on examples that it makes itself, as many as by
default, and on 128 of the training split, three draws of each. Then, with the least effort, on other examples that need
no data: of a language model text that begins with its start token, or with that or a random token, and random tokens;
of an image model white noise. For every cell, on the test split: the Kullback-Leibler divergence of its predictions
from the dense model's and the increase in loss, both in nats per prediction, and accuracy or perplexity; and the
processor's seconds of `compress`.

What is measured replaces the same cells of benchmarks/results/self-calibration.json and leaves the others as they are.
Prints the tables of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import SUBJECTS, opened
from torch import Tensor, nn

from compressor import compress
from compressor.calibration.noise import spectral_noise
from compressor.calibration.settings import SelfGeneratedSettings
from compressor.calibration.written_text import Sampler, continued
from compressor.choices import Effort
from compressor.data import EvaluationData
from compressor.model import evaluation_mode, load_model, logits_of

RESULT = Path(__file__).parent / "results" / "self-calibration.json"
MODELS = ("digits-mlp", "digits-resnet", "digits-vit", "stdlib-llama")
KEEPS = (0.8, 0.6)
SEEDS = (0, 1, 2)
EXAMPLES = 128
LENGTH = 256
SOURCES = ("none", "self", "real")
VARIANTS = {
    "digits-resnet": ("white noise", "spectral noise", "self", "real"),
    "digits-vit": ("white noise", "self", "real"),
    "stdlib-llama": ("random tokens", "text from the start token", "text from either", "self", "real"),
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cell:
    """One compression: of a model to a size, on some examples."""

    model: str
    keep: float
    source: str
    seed: int
    effort: Effort


def examples(cell: Cell, model: nn.Module) -> Any:
    """What the model is calibrated on."""
    generator = torch.Generator().manual_seed(cell.seed)
    match cell.source:
        case "none" | "self":
            return cell.source
        case "real":
            return real(cell)
        case "white noise":
            return {"pixel_values": torch.randn(EXAMPLES, 1, 8, 8, generator=generator)}
        case "spectral noise":
            return {"pixel_values": spectral_noise((EXAMPLES, 1, 8, 8), generator)}
        case "random tokens":
            return {"input_ids": torch.randint(0, 256, (EXAMPLES, LENGTH), generator=generator)}
        case _:
            start: Any = model.config.bos_token_id  # type: ignore[union-attr]
            first = torch.full((EXAMPLES, 1), start)
            if cell.source == "text from either":
                first[::2] = torch.randint(0, 256, (EXAMPLES // 2, 1), generator=generator)
            sampler = Sampler(generator, 257, SelfGeneratedSettings())
            with evaluation_mode(CPU, model):
                return {"input_ids": continued(model, first, LENGTH, sampler=sampler, told=lambda *_: None)}


def real(cell: Cell) -> Any:
    """A draw of the training split; with labels for a module, whose outputs nothing else calls predictions."""
    data = opened(cell.model, "train", None)
    chosen = torch.randperm(data.count, generator=torch.Generator().manual_seed(cell.seed)).tolist()[:EXAMPLES]
    batches = [data.read(chosen[start : start + 16]) for start in range(0, EXAMPLES, 16)]
    [name] = batches[0].inputs
    inputs = torch.cat([batch.inputs[name] for batch in batches])
    if cell.model == "digits-mlp":
        return inputs, torch.cat([batch.labels for batch in batches])
    return {name: inputs}


@torch.no_grad()
def predictions(model: nn.Module, data: EvaluationData) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities of a model and what ought to be predicted, batch by batch."""
    found, labels = [], []
    with evaluation_mode(CPU, model):
        for batch in data:
            logits = logits_of(model, batch.inputs)
            rows = (logits[:, :-1] if logits.dim() == 3 else logits).flatten(0, -2)
            found.append(rows.double().log_softmax(-1))
            labels.append(batch.labels.flatten())
    return found, labels


def measured(cell: Cell) -> dict[str, Any]:
    """One row of the results."""
    torch.set_num_threads(1)
    subject = SUBJECTS[cell.model]
    model = load_model(subject.weights, subject.factory).eval()
    if cell.model == "digits-resnet":
        model.config.image_size = 8  # as the preprocessor of its folder says, which a module has not with it
    test = opened(cell.model, "test", subject.test_examples)
    given: dict[str, Any] = {} if cell.source == "none" else {"effort": cell.effort, "seed": cell.seed}
    given |= {"calibration": examples(cell, model), "prefer": "size", "bits": 16}
    started = time.process_time()
    small = compress(model, keep=cell.keep, **given)
    seconds = time.process_time() - started
    assert small.model is not None
    (dense, labels), (after, _) = predictions(model, test), predictions(small.model, test)
    count = sum(map(len, labels))
    divergence = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(dense, after, strict=True)) / count
    losses = [_loss(each, labels) / count for each in (dense, after)]
    row = {"model": cell.model, "keep": cell.keep, "source": cell.source, "seed": cell.seed, "effort": cell.effort}
    row |= {"divergence": divergence, "dense_loss": losses[0], "loss_increase": losses[1] - losses[0]}
    row |= {"cpu_seconds": round(seconds, 2), "predictions": count}
    if cell.model.startswith("digits"):
        hits = [
            sum(int((p.argmax(-1) == y).sum()) for p, y in zip(each, labels, strict=True)) for each in (dense, after)
        ]
        return row | {"metric": "accuracy", "dense": hits[0] / count, "compressed": hits[1] / count}
    return row | {"metric": "perplexity", "dense": math.exp(losses[0]), "compressed": math.exp(losses[1])}


def _loss(found: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    return sum(-float(p.gather(1, y[:, None]).sum()) for p, y in zip(found, labels, strict=True))


def cells(asked: argparse.Namespace) -> list[Cell]:
    """The main table's cells, then those of the other examples."""
    found = []
    for model, keep, source, seed in product(asked.models, asked.keeps, SOURCES, asked.seeds):
        if source != "none" or seed == asked.seeds[0]:  # without data there is nothing to draw
            found.append(Cell(model, keep, source, seed, asked.effort))
    for model, keep, seed in product(asked.models, asked.keeps, asked.seeds):
        found += [Cell(model, keep, source, seed, "fast") for source in VARIANTS.get(model, ())]
    return [cell for cell in found if asked.sources is None or cell.source in asked.sources]


ORDER = (*SOURCES, "spectral noise", "white noise", "text from the start token", "text from either", "random tokens")


def merged(row: Mapping[str, Any]) -> dict[str, Any]:
    """Put a row in place of the same cell of the results, in a fixed order, and write and return all of them."""
    known = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    keys = ("model", "keep", "source", "seed", "effort")
    by_cell = {tuple(each[key] for key in keys): dict(each) for each in [*known, row]}
    rows = sorted(
        by_cell.values(),
        key=lambda each: (each["model"], each["effort"], -each["keep"], ORDER.index(each["source"]), each["seed"]),
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    document = {"versions": versions, "examples": EXAMPLES, "rows": rows}
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def table(document: Mapping[str, Any]) -> str:
    """None, self and real: means over the draws, and the share of what real data win that `self` wins too."""
    rows = [row for row in document["rows"] if row["effort"] != "fast"]
    lines = [
        "| model | keep | calibration | divergence | loss increase | accuracy or perplexity | won of real data's gain "
        "| seconds |",
        "|---" * 8 + "|",
    ]
    for model, keep in dict.fromkeys((row["model"], row["keep"]) for row in rows):
        of = {source: _of(rows, model=model, keep=keep, source=source) for source in SOURCES}
        for source in SOURCES:
            if not of[source]:
                continue
            won = _won(of) if source == "self" and all(of.values()) else ""
            lines.append(f"| {model} | {keep} | {source} | {_summary(of[source])} | {won} | {_seconds(of[source])} |")
    return "\n".join(lines)


def other_examples(document: Mapping[str, Any]) -> str:
    """Divergences with other examples that need no data, by the least effort: means over the draws."""
    rows = [row for row in document["rows"] if row["effort"] == "fast"]
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    lines = [
        "| model | examples | " + " | ".join(f"keep {keep}" for keep in keeps) + " |",
        "|---" * (2 + len(keeps)) + "|",
    ]
    for model, source in dict.fromkeys((row["model"], row["source"]) for row in rows):
        found = [_mean(_of(rows, model=model, keep=keep, source=source), "divergence") for keep in keeps]
        lines.append(f"| {model} | {source} | " + " | ".join(f"{each:.2g}" for each in found) + " |")
    return "\n".join(lines)


def _of(rows: Sequence[Mapping[str, Any]], *, model: str, keep: float, source: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if (row["model"], row["keep"], row["source"]) == (model, keep, source)]


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows) if rows else math.nan


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    dense, compressed = rows[0]["dense"], _mean(rows, "compressed")
    digits = ".1%" if rows[0]["metric"] == "accuracy" else ".3f"
    quality = f"{dense:{digits}} to {compressed:{digits}}"
    return f"{_mean(rows, 'divergence'):.2g} | {_mean(rows, 'loss_increase'):.2g} | {quality}"


def _won(of: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    none, own, real = (_mean(of[source], "divergence") for source in SOURCES)
    return f"{(none - own) / (none - real):.0%}"


def _seconds(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{statistics.median(row['cpu_seconds'] for row in rows):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--keeps", nargs="+", type=float, default=KEEPS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--sources", nargs="+", choices=ORDER)
    parser.add_argument("--effort", default="best", choices=("balanced", "best"))
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    with ProcessPoolExecutor(asked.processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(measured, cell) for cell in cells(asked)]):
            document = merged(done.result())
            sys.stderr.write(f"{done.result()}\n")
    sys.stdout.write(f"{table(document)}\n\n{other_examples(document)}\n")


if __name__ == "__main__":
    main()
