"""What resizing a large LoRA adapter takes, and how close the result is to the SVD of the dense updates.

    python benchmarks/adapters.py

Makes an adapter of 3,156 modules of rank 128 in float16, with the shapes of a diffusion UNet's attention and
feed-forward layers, about 1.7 GB in a temporary folder, and resizes it with the command. Writes
benchmarks/results/adapters.json and prints its table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compressor.adapters import read_adapter
from compressor.factorize import product_svd
from compressor.io import SafetensorsWriter, TensorInfo, open_checkpoint

RESULT = Path(__file__).parent / "results" / "adapters.json"
MODULES, RANK, SMALL = 3156, 128, 16
WIDTHS, CONTEXT = (320, 640, 1280), 768
RUNS = {f"--rank {SMALL}": ["--rank", str(SMALL)]}


def shapes() -> Iterator[tuple[str, int, int]]:
    """The modules with their outputs and inputs, twelve a block."""
    for at in range(MODULES // 12):
        width, block = WIDTHS[at % len(WIDTHS)], f"lora_unet_down_blocks_{at}_attentions_0"
        inner = f"{block}_transformer_blocks_0"
        for attention, inputs in (("attn1", width), ("attn2", CONTEXT)):
            yield f"{inner}_{attention}_to_q", width, width
            yield f"{inner}_{attention}_to_k", width, inputs
            yield f"{inner}_{attention}_to_v", width, inputs
            yield f"{inner}_{attention}_to_out_0", width, width
        yield f"{inner}_ff_net_0_proj", 8 * width, width
        yield f"{inner}_ff_net_2", width, 4 * width
        yield f"{block}_proj_in", width, width
        yield f"{block}_proj_out", width, width


def make(path: Path) -> None:
    """Write the adapter, a module at a time; the singular values of each fall as a power law."""
    infos = []
    for place, d_out, d_in in shapes():
        infos += [
            TensorInfo(f"{place}.lora_down.weight", (RANK, d_in), torch.float16),
            TensorInfo(f"{place}.lora_up.weight", (d_out, RANK), torch.float16),
            TensorInfo(f"{place}.alpha", (), torch.float16),
        ]
    falling = torch.arange(1, RANK + 1, dtype=torch.float32) ** -0.5
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(path, infos, {"ss_network_dim": str(RANK), "ss_network_alpha": "64"}) as writer:
        for place, d_out, d_in in shapes():
            down = torch.randn(RANK, d_in, generator=generator) * d_in**-0.5
            up = torch.randn(d_out, RANK, generator=generator) * falling * 0.1
            writer.write(f"{place}.lora_down.weight", down.half())
            writer.write(f"{place}.lora_up.weight", up.half())
            writer.write(f"{place}.alpha", torch.tensor(64.0).half())


def resized(file: Path, output: Path, arguments: list[str]) -> dict[str, Any]:
    """Run the command: its wall time, its processor time, its memory, and what it says."""
    command = [str(Path(sys.executable).with_name("compress")), str(file), *arguments, "-o", str(output), "--json"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = json.loads(done.stdout)
    return {
        "seconds": seconds,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_memory_bytes": said["peak_memory_bytes"],
        "bytes": said["bytes"],
        "error": said["adapter"]["error"],
    }


def exactness(file: Path, small: Path) -> dict[str, float]:
    """The largest relative difference to LAPACK's SVD of the dense update, over the modules of the first block.

    Of the factors as they are computed, and as they are stored in float16.
    """
    adapter = read_adapter(open_checkpoint(file))
    computed, stored = 0.0, 0.0
    with safe_open(small, "pt") as tensors:
        for module in adapter.modules[:12]:
            pair = module.factors.read().pair()
            update = pair.up.double() @ pair.down.double()
            left, values, right = torch.linalg.svd(update, full_matrices=False)
            best = left[:, :SMALL] * values[:SMALL] @ right[:SMALL]
            ours = product_svd(pair).even_pair(SMALL).product()
            computed = max(computed, _relative(ours, best))
            up, down = (tensors.get_tensor(f"{module.place}.lora_{side}.weight").double() for side in ("up", "down"))
            stored = max(stored, _relative(up @ down, best))
    return {"computed": computed, "stored": stored}


def _relative(ours: Tensor, best: Tensor) -> float:
    return float((ours - best).norm() / best.norm())


def table(document: Mapping[str, Any]) -> str:
    """Time, memory, and sizes of each run; the load tells how many processes shared the processors."""
    busy = f"time on {document['processors']} cores at load {document['load']:.1f}"
    lines = [f"| | {busy} | processor time | peak memory | file |", "|---|---|---|---|---|"]
    for name, run in document["runs"].items():
        before, after = run["bytes"]["before"], run["bytes"]["after"]
        lines.append(
            f"| `{name}` | {run['seconds']:.0f} s | {run['processor_seconds']:.0f} s"
            f" | {run['peak_memory_bytes'] / 1e6:.0f} MB | {before / 1e6:,.0f} MB to {after / 1e6:,.0f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--adapter", type=Path, help="one that was made before, instead of a new one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = asked.adapter or Path(folder) / "adapter.safetensors"
        if asked.adapter is None:
            make(file)
        small = Path(folder) / "small.safetensors"
        runs = {name: resized(file, small, arguments) for name, arguments in RUNS.items()}
        differences = exactness(file, small)
    document = {
        "modules": MODULES,
        "rank": RANK,
        "to": SMALL,
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "torch": torch.__version__,
        "runs": runs,
        "relative_difference": differences,
    }
    asked.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))
    print(differences)


if __name__ == "__main__":
    main()
