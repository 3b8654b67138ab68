"""What including the embedding wins on stdlib-llama, whose output head is tied to it, at the same size of the file.

    OMP_NUM_THREADS=1 python benchmarks/embeddings.py

Writes benchmarks/results/embeddings.json and prints its rows.
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

from compressor import compress

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "embeddings.json"
SIZES = (2_000_000, 1_400_000)


def run(size: int, embeddings: bool, folder: Path) -> dict[str, Any]:
    """The loss on the test text, at a size of the weight file, with or without the embedding."""
    report = compress(
        ROOT / "model_cards" / "stdlib-llama",
        output=folder / "small",
        max_size=size,
        prefer="size",
        bits=16,
        embeddings=embeddings,
        calibration="builtin:stdlib",
        data="builtin:stdlib",
        data_samples=512,
        overwrite=True,
    )
    assert report.evaluation is not None
    assert report.plan.calibration is not None
    ranks = {layer.name: layer.rank for layer in report.plan.layers}
    return {
        "max_size": size,
        "embeddings": embeddings,
        "bytes": report.to_dict()["bytes"],
        "rank_of_embedding": ranks.get("model.embed_tokens"),
        "holdout_loss": report.plan.calibration.holdout_loss,
        "predictions": report.evaluation.count,
        "baseline": report.evaluation.baseline,
        "compressed": report.evaluation.compressed,
        "loss_increase": report.evaluation.compressed_loss - report.evaluation.baseline_loss,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(size, embeddings, Path(folder)) for size in SIZES for embeddings in (False, True)]
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULT.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    main()
