"""Time, memory and disk at the sizes of real language models, beside SVD-LLM's steps on the same model and windows.

    python benchmarks/scale.py [--quick] [--cells PART ...] [--folder SCRATCH] [--anew]

Llamas of random weights are written to a temporary folder and compressed to 60 % with `effort` fast, balanced and best
on windows of 256 random tokens; so are small ones of 2, 4 and 8 blocks, of 4, 8 and 16 experts, and on 8, 16 and 32
windows, for time against each. SVD-LLM's steps are those of its published code, at its precision: the second moments of
the inputs of each layer in float32, their Cholesky factors in float64, the SVD in float32, both factors.

Each cell runs in a process of its own, from the folder to files: the processor's seconds of it and its children after
the libraries are imported; the peak resident size, libraries included; the peak that no file backs, and the most disk
that temporary files took, both sampled. `needs` is what the run said beforehand. The weights are random: nothing is
said of quality. Cells that benchmarks/results/scale.json has are not measured again (`--anew` does), so that an
interrupted run goes on; `--quick` is for development, scales all of it down and writes scale-quick.json beside the
temporary files. Use as many threads as cores; cells are comparable where `threads` are the same.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from baselines import inputs_seen, plain_size, uniform_ranks
from memory import anonymous_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

import compressor
from compressor.model import load_transformers, logits_of

RESULT = Path(__file__).parent / "results" / "scale.json"
KEEP, WINDOW, AT_ONCE = 0.6, 256, 32
EFFORTS = ("fast", "balanced", "best")
SVD_LLM = "SVD-LLM"


@dataclass(frozen=True)
class Shape:
    """A Llama, or with experts a Mixtral, and how many windows it is calibrated on."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    windows: int
    tied: bool = True
    dtype: str = "float32"
    experts: int = 0

    @property
    def config(self) -> transformers.PretrainedConfig:
        sizes = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": WINDOW,
            "tie_word_embeddings": self.tied,
            "dtype": self.dtype,
        }
        if self.experts:
            return transformers.MixtralConfig(**sizes, num_local_experts=self.experts, num_experts_per_tok=2)
        return transformers.LlamaConfig(**sizes)


LLAMA_135M = Shape("135M", 30, 576, 1536, 9, 3, 49_152, windows=128)
LLAMA_1B = Shape("1.1B", 22, 2048, 5632, 32, 4, 32_000, windows=16, tied=False, dtype="bfloat16")
SMALL = Shape("small", 4, 192, 512, 4, 2, 512, windows=16)
GROWING = {
    "blocks": [replace(SMALL, name=f"{blocks} blocks", blocks=blocks) for blocks in (2, 4, 8)],
    "experts": [
        replace(SMALL, name=f"{experts} experts", blocks=2, intermediate=256, experts=experts) for experts in (4, 8, 16)
    ],
    "windows": [replace(SMALL, name=f"{windows} windows", windows=windows) for windows in (8, 16, 32)],
}


@dataclass(frozen=True)
class Cell:
    """One process: a model and what is done with it."""

    part: str
    shape: Shape
    method: str

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.part, self.method, *asdict(self.shape).values())


def cells(*, quick: bool) -> list[Cell]:
    """All of them, the shortest first."""
    scaled = quickly if quick else lambda shape: shape
    growing = [Cell(part, shape, effort) for part, shapes in GROWING.items() for shape in shapes for effort in EFFORTS]
    large = [Cell("135M", scaled(LLAMA_135M), method) for method in (SVD_LLM, *EFFORTS)]
    return [*growing, *large, *(Cell("1.1B", scaled(LLAMA_1B), method) for method in (SVD_LLM, "fast"))]


def quickly(shape: Shape) -> Shape:
    """A few blocks and windows of a shape."""
    return replace(shape, blocks=4 if shape.hidden < 1000 else 2, windows=8)


def make_model(shape: Shape, folder: Path) -> None:
    """Write a model of random weights, and its windows of random tokens."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    dtype = getattr(torch, shape.dtype)
    kind = transformers.MixtralForCausalLM if shape.experts else transformers.LlamaForCausalLM
    torch.set_default_dtype(dtype)
    model = kind(shape.config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokens = np.random.default_rng(0).integers(3, shape.vocabulary, (shape.windows, WINDOW))
    np.savez(folder / "windows.npz", input_ids=tokens)


def svd_llm_steps(folder: Path, output: Path) -> None:
    """Compress as SVD-LLM's code does in its first step (`W = U S V`, whitened), from folder to file."""
    model = load_transformers(folder).eval()
    model.requires_grad_(False)
    windows = torch.from_numpy(np.load(folder / "windows.npz")["input_ids"])
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"
    }
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    ranks = uniform_ranks(shapes, KEEP, plain_size)
    moments = float32_moments(model, layers, windows.split(AT_ONCE))
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        root = torch.linalg.cholesky(positive(moments.pop(name).double())).float()
        left, values, right = torch.linalg.svd(layer.weight.float() @ root, full_matrices=False)
        rank = ranks[name]
        scale = values[:rank].sqrt()
        found[f"{name}.up.weight"] = ((left[:, :rank]) * scale).to(layer.weight.dtype).contiguous()
        whitened = scale[:, None] * right[:rank]
        down = torch.linalg.solve_triangular(root, whitened, upper=False, left=False)
        found[f"{name}.down.weight"] = down.to(layer.weight.dtype).contiguous()
    save_file(found, output)


@torch.no_grad()
def float32_moments(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The sum of `x x^T` over the inputs of every layer, each for itself, in float32."""
    sums: dict[str, Tensor] = {}

    def seen(name: str, x: Tensor) -> None:
        vectors = x.flatten(0, -2).float()
        product = vectors.T @ vectors
        sums[name] = product if name not in sums else sums[name].add_(product)

    with inputs_seen(layers, seen):
        for batch in batches:
            logits_of(model, {"input_ids": batch})
    return sums


def positive(moment: Tensor) -> Tensor:
    """A moment shifted until it is positive definite, as SVD-LLM's code does."""
    lowest = torch.linalg.eigvalsh(moment)[0] if torch.linalg.cholesky_ex(moment).info else torch.zeros(())
    return moment if lowest >= 0 else moment + (1e-6 - lowest) * torch.eye(len(moment), dtype=moment.dtype)


def work(method: str, folder: Path, output: Path) -> dict[str, Any]:
    """One cell, in this process: the processor's seconds, of which some children's, and what was said beforehand."""
    assert transformers.LlamaForCausalLM  # imported when it is first asked for, which takes seconds
    assert transformers.MixtralForCausalLM
    libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = cpu_seconds()
    needs: dict[str, Any] = {}
    if method == SVD_LLM:
        svd_llm_steps(folder, output.with_suffix(".safetensors"))
    else:
        made = compressor.compress(
            folder,
            output=output,
            keep=KEEP,
            calibration=folder / "windows.npz",
            effort=method,
            prefer="size",
            bits=16,
            progress=Listening(),
        )
        needs = made.to_dict()["needs"]
        for each in needs.values():
            if isinstance(each, dict):
                each.pop("place")  # a path of this machine
    return {"cpu_seconds": round(cpu_seconds() - started, 2), "libraries_bytes": libraries, "needs": needs}


class Listening:
    """A progress that takes steps, so that the run says how long it will take."""

    def expect(self, steps: object) -> None:
        pass

    def __call__(self, *_: object) -> None:
        pass


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in both)


def measured(cell: Cell, scratch: Path) -> dict[str, Any]:
    """A cell, in a process of its own with a folder for temporary files of its own."""
    shape = cell.shape  # `--quick` has fewer blocks and windows of a shape of the same name
    folder = scratch / f"{shape.name.replace(' ', '-')}-{shape.blocks}-{shape.windows}"
    if not (folder / "windows.npz").exists():
        shutil.rmtree(folder, ignore_errors=True)
        in_process = [sys.executable, __file__, "--make", json.dumps(asdict(cell.shape)), str(folder)]
        subprocess.run(in_process, check=True)
    temporary, output = scratch / "temporary", scratch / "output"
    for each in (temporary, output):
        shutil.rmtree(each, ignore_errors=True)
    temporary.mkdir()
    command = [sys.executable, __file__, "--work", cell.method, str(folder), str(output)]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(temporary)})
    anonymous = disk = 0
    while not (waited := os.wait4(process.pid, os.WNOHANG))[0]:
        anonymous, disk = max(anonymous, anonymous_bytes(process.pid)), max(disk, size_of(temporary))
        time.sleep(0.1)
    assert process.stdout is not None
    said = process.stdout.read()
    if os.waitstatus_to_exitcode(waited[1]) != 0:
        raise SystemExit(f"{cell.part}, {cell.shape.name}, {cell.method}: failed")
    output.with_suffix(".safetensors").unlink(missing_ok=True)
    return {
        "part": cell.part,
        "method": cell.method,
        "shape": asdict(cell.shape),
        **json.loads(said),
        "seconds": round(time.monotonic() - began, 1),
        "peak_resident_bytes": waited[2].ru_maxrss * 1024,
        "peak_anonymous_bytes": anonymous,
        "temporary_bytes": disk,
        "largest_block_bytes": largest_block(folder),
        "checkpoint_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "threads": torch.get_num_threads(),
    }


def largest_block(folder: Path) -> int:
    """Bytes of the weights of a block in a checkpoint."""
    from compressor.io import open_checkpoint

    blocks: dict[str, int] = {}
    for name, info in open_checkpoint(folder).tensors.items():
        if name.startswith("model.layers."):
            block = name.split(".")[2]
            blocks[block] = blocks.get(block, 0) + info.nbytes
    return max(blocks.values())


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder from which others are removed meanwhile."""
    total = 0
    for root, _, names in os.walk(folder, onerror=lambda _: None):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size  # noqa: PTH116, PTH118 - many times a second
            except OSError:
                continue
    return total


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["part"], row["method"], *row["shape"].values())


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}  # type: ignore[no-any-return]


def put(row: Mapping[str, Any], path: Path) -> None:
    """Put a row in the place of the same cell of the results."""
    others = [each for each in read(path)["rows"] if key_of(each) != key_of(row)]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    rows = sorted([*others, row], key=lambda each: [str(part).rjust(8) for part in key_of(each)])
    path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def table(document: Mapping[str, Any]) -> str:
    """The large models: time beside SVD-LLM's steps, memory beyond the largest block, disk, and what was said."""
    lines = [
        "| model | method | CPU seconds | beside SVD-LLM | peak memory | beyond a block | temporary files | said:"
        " memory | said: files |",
        "|---" * 9 + "|",
    ]
    rows = [row for row in document["rows"] if row["part"] in ("135M", "1.1B")]
    for row in sorted(rows, key=lambda row: (row["part"], [SVD_LLM, *EFFORTS].index(row["method"]))):
        base = [each for each in rows if each["part"] == row["part"] and each["method"] == SVD_LLM]
        ratio = f"{row['cpu_seconds'] / base[0]['cpu_seconds']:.2f}" if base else ""
        peak, needs = row["peak_resident_bytes"], row["needs"]
        said = [gigabytes(needs[what]["needed"]) if needs else "" for what in ("memory", "temporary")]
        cells = [row["part"], row["method"], f"{row['cpu_seconds']:.0f}", ratio, gigabytes(peak)]
        cells += [gigabytes(peak - row["largest_block_bytes"]), gigabytes(row["temporary_bytes"]), *said]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth_table(document: Mapping[str, Any]) -> str:
    """The small models: CPU seconds and peak memory against blocks, experts and windows."""
    lines = ["| of a small model | effort | CPU seconds | peak memory, GB |", "|---|---|---|---|"]
    for part, shapes in GROWING.items():
        for effort in EFFORTS:
            known = {key_of(row): row for row in document["rows"]}
            rows = [known.get(Cell(part, shape, effort).key) for shape in shapes]
            if all(rows):
                names = ", ".join(shape.name.split()[0] for shape in shapes)
                seconds = ", ".join(f"{row['cpu_seconds']:.1f}" for row in rows if row)
                memory = ", ".join(f"{row['peak_resident_bytes'] / 1e9:.2f}" for row in rows if row)
                lines.append(f"| {names} {part} | {effort} | {seconds} | {memory} |")
    return "\n".join(lines)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def chosen(parts: Sequence[str], *, quick: bool) -> Iterator[Cell]:
    """The cells of some parts, or of some methods in them, as 135M/fast."""
    for cell in cells(quick=quick):
        if not parts or cell.part in parts or f"{cell.part}/{cell.method}" in parts:
            yield cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few blocks and windows")
    parser.add_argument("--cells", nargs="+", default=[], help="parts, or PART/METHOD, such as 135M/fast")
    parser.add_argument("--anew", action="store_true", help="measure cells again that the results have")
    parser.add_argument("--folder", type=Path, help="where there is room, default a temporary folder; kept if given")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        make_model(Shape(**json.loads(asked.make[0])), Path(asked.make[1]))
        return
    if asked.work:
        method, folder, output = asked.work
        sys.stdout.write(json.dumps(work(method, Path(folder), Path(output))))
        return
    scratch = asked.folder or Path(tempfile.mkdtemp())
    scratch.mkdir(exist_ok=True)
    result = scratch / "scale-quick.json" if asked.quick else RESULT
    try:
        known = set() if asked.anew else {key_of(row) for row in read(result)["rows"]}
        for cell in chosen(asked.cells, quick=asked.quick):
            if cell.key not in known:
                row = measured(cell, scratch)
                put(row, result)
                sys.stderr.write(f"{cell.part}, {cell.shape.name}, {cell.method}: {row['cpu_seconds']} s\n")
        document = read(result)
        sys.stdout.write(table(document) + "\n\n" + growth_table(document) + "\n")
    finally:
        if asked.folder is None:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
