"""Loss against size: ours beside published low-rank compressors, at the same number of stored parameters.

    python benchmarks/quality.py [MODEL ...]

For digits-vit and stdlib-llama, three draws of calibration data each: every method gets the same examples (of the
training split) and the same size, counted in stored numbers; the loss is that of the test split. The published methods
keep the same fraction of every linear layer and leave the classifier and the convolutions as they are, which counts as
stored; ours shares one budget. So the comparison is of whole methods: it does not tell the metric's part from the
allocation's. Beside ours stand ours with plain pairs, and ours without data. Writes
benchmarks/results/quality-MODEL.json and prints a table.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from baselines import (
    asvd,
    equalised,
    input_statistics,
    matrices,
    plain_svd,
    set_matrix,
    stored,
    svd_llm,
    svd_llm_sequential,
)
from torch import nn

from compressor import compress
from compressor.evaluation import EvaluationData, load_preprocessing, load_transformers, measure_quality, open_data

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = {"digits-vit": "builtin:digits", "stdlib-llama": "builtin:stdlib"}
HEAD = "classifier"
KEEPS = (0.8, 0.6, 0.4, 0.2)
SEEDS = (0, 1, 2)
EXAMPLES = {"digits-vit": 128, "stdlib-llama": 64}
TEST_EXAMPLES = {"digits-vit": None, "stdlib-llama": 128}


def main() -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    RESULTS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or list(DATA):
        rows = compare(name)
        document = json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n"
        (RESULTS / f"quality-{name}.json").write_text(document, encoding="utf-8")
        sys.stdout.write(table(rows) + "\n")


def opened(name: str, split: Any, limit: int | None) -> EvaluationData:
    prepared = load_preprocessing(ROOT / "model_cards" / name)
    return open_data(
        DATA[name],
        split=split,
        tokenizer=prepared.tokenizer,
        image_processor=prepared.image_processor,
        classes=prepared.classes,
        sequence_length=prepared.sequence_length,
        limit=limit,
    )


def compare(name: str) -> list[dict[str, Any]]:
    """All methods, sizes and seeds on one reference model, each size and seed in a process of its own."""
    cells = [(name, seed, keep) for seed in SEEDS for keep in KEEPS]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(compare_at, *zip(*cells, strict=True)) for row in rows]


def compare_at(name: str, seed: int, keep: float) -> list[dict[str, Any]]:
    """All methods at one size, with the calibration data of one seed."""
    torch.set_num_threads(1)
    model = load_transformers(ROOT / "model_cards" / name).eval()
    test = opened(name, "test", TEST_EXAMPLES[name])
    dense = measure_quality(model, test).loss
    train = opened(name, "train", None)
    chosen = torch.randperm(train.count, generator=torch.Generator().manual_seed(seed))[: EXAMPLES[name]].tolist()
    batches = [train.read(chosen[start : start + 16]).inputs for start in range(0, len(chosen), 16)]
    rows = []
    for method, loss, kept in methods(model, batches, keep, seed, test):
        row = {"model": name, "keep": keep, "seed": seed, "method": method, "kept": kept, "dense_loss": dense}
        rows.append(row | {"loss_increase": loss - dense})
        sys.stderr.write(f"{name} {keep} {seed} {method}: {loss - dense:+.4f} nats, kept {kept:.4f}\n")
    return rows


def methods(
    model: nn.Module, batches: list[Mapping[str, torch.Tensor]], keep: float, seed: int, test: EvaluationData
) -> list[tuple[str, float, float]]:
    """Every method's loss on the test data, and the share of the eligible parameters that it stores."""
    ours = compress(model, keep=keep, calibration=batches, seed=seed)
    eligible = [layer.name for layer in ours.plan.layers]
    total = ours.plan.eligible_before
    target = ours.plan.eligible_after
    # The papers compress the blocks' linear layers and leave the head as it is, which here counts as stored.
    layers = {
        name: module
        for name, module in model.named_modules()
        if name in eligible and type(module) is nn.Linear and name != HEAD
    }
    left_dense = total - sum(module.weight.numel() for module in layers.values())
    shapes = {name: (module.out_features, module.in_features) for name, module in layers.items()}
    plain, pivoted = (equalised(shapes, target - left_dense, pivoted=form) for form in (False, True))
    moments, magnitudes = input_statistics(model, layers, batches)
    weights = matrices(layers)
    baselines = {
        "truncated SVD": (plain_svd(weights, plain), plain, False),
        "ASVD": (asvd(weights, plain, magnitudes), plain, False),
        "SVD-LLM": (svd_llm(weights, plain, moments), plain, False),
        "SVD-LLM, sequential": (svd_llm_sequential(model, layers, plain, batches), plain, False),
        "SVD-LLM, pivoted": (svd_llm(weights, pivoted, moments), pivoted, True),
        "SVD-LLM, sequential, pivoted": (svd_llm_sequential(model, layers, pivoted, batches), pivoted, True),
    }
    found = []
    for method, (replaced, ranks, form) in baselines.items():
        changed = copy.deepcopy(model)
        for name, matrix in replaced.items():
            set_matrix(changed.get_submodule(name), matrix)
        kept = (stored(shapes, ranks, pivoted=form) + left_dense) / total
        found.append((method, measure_quality(changed, test).loss, kept))
    own = {
        "ours": ours,
        "ours, plain pairs": compress(model, keep=keep, calibration=batches, seed=seed, form="plain"),
        "ours, no data": compress(model, keep=keep),
    }
    for method, report in own.items():
        assert report.model is not None
        kept = report.plan.eligible_after / total
        found.append((method, measure_quality(report.model, test).loss, kept))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Mean loss increase over the seeds (least to most), in nats per prediction, as Markdown."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        lines += [f"| {name} | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |", "|---" * (len(KEEPS) + 1) + "|"]
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = []
            for keep in KEEPS:
                key = (name, method, keep)
                losses = [r["loss_increase"] for r in rows if (r["model"], r["method"], r["keep"]) == key]
                cells.append(f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
