"""Peak memory of compressing a sharded checkpoint much larger than it: 4 GB of random weights by default.

    python benchmarks/memory.py [--gigabytes 4] [--folder SCRATCH]

Writes benchmarks/results/memory.json: the checkpoint's size, the peak resident size and the time of each command, run
in a process of its own. The weights are random, so nothing is said about quality.
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
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from compressor.io import ShardedWriter, TensorInfo, plan_shards, write_json

RESULT = Path(__file__).parent / "results" / "memory.json"
HIDDEN, INTERMEDIATE, VOCABULARY, SHARD = 2048, 5632, 4096, 2**30


def layer_shapes(index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one Llama block with grouped-query attention."""
    prefix = f"model.layers.{index}"
    return {
        f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.self_attn.k_proj.weight": (HIDDEN // 4, HIDDEN),
        f"{prefix}.self_attn.v_proj.weight": (HIDDEN // 4, HIDDEN),
        f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
    }


def make_checkpoint(folder: Path, size: int) -> int:
    """Write a sharded Llama folder of at least `size` bytes of float32 noise, and return its size in bytes."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    blocks = 0
    infos: list[TensorInfo] = []
    while sum(info.nbytes for info in infos) < size:
        shapes |= layer_shapes(blocks)
        blocks += 1
        infos = [TensorInfo(name, shape, torch.float32) for name, shape in shapes.items()]
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    folder.mkdir()
    write_json(folder / "config.json", config.to_dict())
    torch.manual_seed(0)
    with ShardedWriter(folder, plan_shards(infos, SHARD), {"format": "pt"}) as writer:
        for name, tensor in noise(infos):
            writer.write(name, tensor)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def noise(infos: list[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    for info in infos:
        yield info.name, torch.randn(info.shape) * 0.02


def measured(*arguments: str) -> dict[str, object]:
    """Run `compress` in a process of its own: seconds, and peak resident size in bytes as the system counted it."""
    command = [str(Path(sys.executable).with_name("compress")), *arguments, "--quiet"]
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}")
    return {
        "command": "compress " + " ".join(Path(a).name if os.sep in a else a for a in arguments),
        "seconds": round(time.monotonic() - started, 1),
        "peak_resident_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument(
        "--folder", type=Path, help="where there is room for twice the size; default a temporary folder"
    )
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        source, small, dense = scratch / "model", scratch / "small", scratch / "dense"
        size = make_checkpoint(source, int(arguments.gigabytes * 1e9))
        runs = [
            measured(str(source), "--output", str(small), "--keep", "0.5", "--max-shard-size", "1GB"),
            measured("restore", str(small), "--output", str(dense), "--max-shard-size", "1GB"),
        ]
    finally:
        shutil.rmtree(scratch)
    result = {
        "checkpoint_bytes": size,
        "peak_of_this_process_while_making_it_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "runs": runs,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
