"""What each reference model loses at each size, without calibration data.

    python benchmarks/reference_models.py

Compresses every model of model_cards/ with no options and at --keep 0.8, 0.6 and 0.4, evaluates it on the test split,
restores it and evaluates that too. Writes benchmarks/results/reference_models.json and prints the table of the README.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from compressor import QualityGateNotMet, compress, evaluate, restore

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "reference_models.json"
CARDS = ROOT / "model_cards"

# What to compress, the data it is tested on, and the function that builds it where transformers does not.
MODELS: dict[str, tuple[Path, str, str | None]] = {
    "digits-mlp": (
        CARDS / "digits-mlp" / "model.safetensors",
        "builtin:digits",
        f"{CARDS / 'digits-mlp' / 'train.py'}:build_model",
    ),
    "digits-resnet": (CARDS / "digits-resnet", "builtin:digits", None),
    "digits-vit": (CARDS / "digits-vit", "builtin:digits", None),
    "stdlib-llama": (CARDS / "stdlib-llama", "builtin:stdlib", None),
}
# The test text is long: this many of its windows, evenly spaced, are enough to tell the models apart.
SAMPLES = {"stdlib-llama": 512}
REQUESTS: tuple[dict[str, float], ...] = ({}, {"keep": 0.8}, {"keep": 0.6}, {"keep": 0.4})


def run(name: str, request: dict[str, float], folder: Path) -> dict[str, Any]:
    """One model at one size: what it kept, what it lost, and that its restored form loses the same."""
    source, data, factory = MODELS[name]
    suffix = source.suffix
    output, dense = (folder / f"{name}-{which}{suffix}" for which in ("small", "dense"))
    row: dict[str, Any] = {"model": name, "request": request}
    try:
        report = compress(
            source,
            output=output,
            prefer="size",
            data=data,
            data_samples=SAMPLES.get(name),
            factory=factory,
            overwrite=True,
            **request,  # type: ignore[arg-type]
            **({"calibration": "none"} if request else {}),
        )
    except QualityGateNotMet as refused:
        return row | {"refused": str(refused).replace(f"{ROOT}/", "")}
    restore(output, output=dense, overwrite=True)
    restored = evaluate(dense, data=data, data_samples=SAMPLES.get(name), factory=factory)
    assert report.evaluation is not None
    return row | {
        "budget": report.plan.budget.to_dict(),
        "predictions": report.evaluation.count,
        "eligible_kept": report.plan.eligible_after / report.plan.eligible_before,
        "parameters": report.to_dict()["parameters"],
        "bytes": report.to_dict()["bytes"],
        "metric": report.evaluation.metric,
        "baseline": report.evaluation.baseline,
        "compressed": report.evaluation.compressed,
        "restored": restored.compressed,
        "baseline_loss": report.evaluation.baseline_loss,
        "compressed_loss": report.evaluation.compressed_loss,
    }


def table(document: dict[str, Any]) -> str:
    """The Markdown table of the README."""
    lines = ["| model | asked | eligible kept | file | metric | before | after |", "|---|---|---|---|---|---|---|"]
    for row in document["rows"]:
        asked = f"`--keep {row['request']['keep']} --calibration none`" if row["request"] else "nothing"
        if "refused" in row:
            lines.append(f"| {row['model']} | {asked} | refused | | | | |")
            continue
        digits = ".1%" if row["metric"] == "accuracy" else ".2f"
        size = row["bytes"]["after"] / row["bytes"]["before"]
        lines.append(
            f"| {row['model']} | {asked} ({row['budget']['kind']}) | {row['eligible_kept']:.0%} | {size:.0%} "
            f"| {row['metric']} | {row['baseline']:{digits}} | {row['compressed']:{digits}} |"
        )
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(name, request, Path(folder)) for name in MODELS for request in REQUESTS]
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULT.parent.mkdir(exist_ok=True)
    document = {"versions": versions, "rows": rows}
    RESULT.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(document) + "\n")


if __name__ == "__main__":
    main()
