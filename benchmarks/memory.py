"""Peak memory of the commands, on models of random weights.

    python benchmarks/memory.py sharded [--gigabytes 4] [--folder SCRATCH]
    python benchmarks/memory.py calibrated [--folder SCRATCH]

`sharded` compresses and restores a sharded checkpoint that is much larger than the memory that this takes.

`calibrated` compresses the attention of a Mixtral with calibration, and evaluates it. Nearly all of its weights are the
experts, which stay as they are, so that the models in memory outweigh the matrices of the computation. transformers
copies experts into stacks when it loads them, while other weights stay mapped from their file. What the same command
takes on a tiny model is subtracted; the rest, in units of the dense weights, is `dense_models_resident`, with the pages
of files that the system had in memory, and `dense_models_anonymous` without them.

At the peak both models are in memory, because they are timed side by side; `calibrated_before_the_model_was_shared` in
the results was measured when the dense one was loaded once more, for the evaluation.

Each command runs in a process of its own. Writes its peak sizes, its time, and the processor's to
benchmarks/results/memory.json, where the figures of the other measurement stay, and those of the first version: its
time was taken on two busy cores, so that its processor's time is at most twice as much. The anonymous size is Linux's
`RssAnon`, sampled twenty times a second. The weights are random: the figures say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from compressor.io import ShardedWriter, TensorInfo, plan_shards, write_json

RESULT = Path(__file__).parent / "results" / "memory.json"
HIDDEN, INTERMEDIATE, VOCABULARY, SHARD = 2048, 5632, 4096, 2**30
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_local_experts": 16}
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 2}
BLOCKS, VOCABULARY_OF_BYTES, WINDOWS, TOKENS = 4, 256, 16, 16


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


def make_mixtral(folder: Path, sizes: dict[str, int]) -> int:
    """Write a Mixtral and two files of tokens to a new folder, and return the bytes of its weights."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **sizes,
        vocab_size=VOCABULARY_OF_BYTES,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for name in ("calibration", "data"):
        np.savez(folder / f"{name}.npz", input_ids=generator.integers(3, VOCABULARY_OF_BYTES, (WINDOWS, TOKENS)))
    return (folder / "model" / "model.safetensors").stat().st_size


def measured(*arguments: str) -> dict[str, Any]:
    """Run `compress` in a process of its own: seconds, and peak sizes in bytes as the system counted them."""
    command = [str(Path(sys.executable).with_name("compress")), *arguments, "--quiet"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = 0
    while not (waited := os.wait4(process.pid, os.WNOHANG))[0]:
        anonymous = max(anonymous, anonymous_bytes(process.pid))
        time.sleep(0.05)
    _, status, usage = waited
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}")
    return {
        "command": "compress " + " ".join(Path(a).name if os.sep in a else a for a in arguments),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_resident_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "peak_anonymous_bytes": anonymous,
    }


def anonymous_bytes(process: int) -> int:
    """Resident memory of a process that no file backs; 0 where the system does not tell."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def sharded(scratch: Path, size: int) -> dict[str, Any]:
    source, small, dense = scratch / "model", scratch / "small", scratch / "dense"
    checkpoint_bytes = make_checkpoint(source, size)
    return {
        "checkpoint_bytes": checkpoint_bytes,
        "peak_of_this_process_while_making_it_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "runs": [
            measured(
                str(source), "--output", str(small), "--keep", "0.5", "--prefer", "size", "--max-shard-size", "1GB"
            ),
            measured("restore", str(small), "--output", str(dense), "--max-shard-size", "1GB"),
        ],
    }


def calibrated(scratch: Path) -> dict[str, Any]:
    runs, dense_bytes = {}, {}
    for name, sizes in {"tiny": TINY, "wide": WIDE}.items():
        folder = scratch / name
        dense_bytes[name] = make_mixtral(folder, sizes)
        files = ["--calibration", str(folder / "calibration.npz"), "--data", str(folder / "data.npz")]
        runs[name] = measured(
            str(folder / "model"),
            "--output",
            str(folder / "small"),
            "--keep",
            "0.6",
            "--prefer",
            "size",
            "--bits",
            "16",
            "--exclude",
            "*.experts.*",
            *files,
        )
    taken = {
        f"dense_models_{kind}": round(
            (runs["wide"][f"peak_{kind}_bytes"] - runs["tiny"][f"peak_{kind}_bytes"]) / dense_bytes["wide"], 2
        )
        for kind in ("resident", "anonymous")
    }
    return {"dense_bytes": dense_bytes["wide"], **taken, "runs": runs}


def sharded_table(document: dict[str, Any]) -> str:
    """Time and peak of both commands, in the first version and now."""
    lines = ["| | command | seconds | CPU seconds | peak memory |", "|---|---|---|---|---|"]
    for version, key in (("first version", "sharded_in_the_first_version"), ("now", "sharded")):
        for run in document.get(key, {"runs": []})["runs"]:
            verb = "restore" if " restore " in run["command"] else "compress"
            spent = f"{run['cpu_seconds']:.0f}" if "cpu_seconds" in run else "-"
            lines.append(
                f"| {version} | {verb} | {run['seconds']:.0f} | {spent} | {run['peak_resident_bytes'] / 1e9:.2f} GB |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sharded", "calibrated"])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the sharded checkpoint")
    parser.add_argument(
        "--folder", type=Path, help="where there is room for twice the size; default a temporary folder"
    )
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        found = (
            calibrated(scratch) if arguments.what == "calibrated" else sharded(scratch, int(arguments.gigabytes * 1e9))
        )
    finally:
        shutil.rmtree(scratch)
    found |= {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(results | {arguments.what: found}, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
