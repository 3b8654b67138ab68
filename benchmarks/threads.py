"""Decompositions of several layers: one at a time with all threads inside LAPACK, or one a thread.

    python benchmarks/threads.py [--sizes 256 576 1024] [--repeats 3]

Takes all threads that PyTorch has, so it is run without OMP_NUM_THREADS, on a machine that does nothing else. For each
size of Gram matrices, in float64, both ways take turns, and the least seconds of each are kept. Writes
`results/threads.json`, with the load of the machine before it began: processes that wait for a core.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine import Engine, InProcess
from compressor.io import write_json

RESULT = Path(__file__).parent / "results" / "threads.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 576, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    result = {
        "machine": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "load_before": round(load, 2),
        "sizes": [measured(size, torch.get_num_threads(), asked.repeats) for size in asked.sizes],
    }
    write_json(asked.output, result)
    print(table(result))


def measured(size: int, threads: int, repeats: int) -> dict[str, Any]:
    """Least seconds of decomposing four matrices a thread, both ways."""
    generator = torch.Generator().manual_seed(0)
    grams = [gram(size, generator) for _ in range(4 * threads)]
    engines: dict[str, Engine] = {"inside": InProcess(1), "across": InProcess(threads)}
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            began = time.perf_counter()
            found = list(engine.map(torch.linalg.eigh, grams))
            taken[name].append(time.perf_counter() - began)
            assert len(found) == len(grams)
    return {"size": size, "matrices": len(grams)} | {f"{name}_seconds": min(each) for name, each in taken.items()}


def gram(size: int, generator: torch.Generator) -> Tensor:
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return matrix @ matrix.T


def table(result: dict[str, Any]) -> str:
    """Seconds both ways, and their ratio, for each size."""
    head = ["| size | matrices | threads inside LAPACK | a matrix a thread | ratio |", "|---|---|---|---|---|"]
    rows: Sequence[dict[str, Any]] = result["sizes"]
    return "\n".join(
        [
            *head,
            *(
                f"| {row['size']} | {row['matrices']} | {row['inside_seconds']:.2f} s | {row['across_seconds']:.2f} s"
                f" | {row['across_seconds'] / row['inside_seconds']:.2f} |"
                for row in rows
            ),
        ]
    )


if __name__ == "__main__":
    main()
