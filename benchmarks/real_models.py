"""Trained models that anybody can install: compressed, measured, and timed.

    OMP_NUM_THREADS=1 python benchmarks/real_models.py [--models MODEL ...] [--methods METHOD ...] [--packages FOLDER]
                                                       [--again] [--quick --output FILE]

Packages of the index ship them, and the data too; `benchmarks/real_subjects.py` says which, and downloads nothing else.

- `ours`: the command `compress` in a process of its own, at shares of the 16-bit bytes of the linear and convolutional
  layers beside int8, int4, int3, and 2 bits. `cpu_seconds` and `peak_bytes` are of that process, from its start to the
  file; what is measured is the file, loaded. What has been measured of a model is kept for its other sizes
  (`--calibration-cache`), as a user would: `first` says that nothing was kept yet.
- `ours, for speed`: the same with `--prefer speed`.
- `nearest` and `GPTQ`: all of these layers at one width, by our code, as in `benchmarks/bytes.py`.

`share` counts the layers' tensors in the file, floating-point numbers in two bytes; `file` is the size on disk. Loss is
in nats a prediction, on test examples that are not those of the calibration; its error is the standard error of the
mean change over the examples, or over the pictures that they are parts of. `agreement` is how often the most likely
class is the dense model's. `latency` is the time of one example over that of the dense model in the same dtype, each
run in turn on one thread, the median; before that it is checked that the layers that run have the shapes and bytes of
the file.

Cells are kept one by one in benchmarks/results/real_models.json, and those that are there are not measured again: an
interrupted run goes on. `--again` measures what is asked for anew. Prints the table of the README.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from bytes import (
    BESIDE,
    Given,
    by_model,
    file_bytes,
    gptq_matrices,
    has,
    line,
    nearest_matrices,
    rounded,
    with_matrices,
)
from quality import Measurement, Setting
from real_subjects import IGNORED, MODELS, STAND_IN, STAND_INS, Prepared, unpacked
from torch import Tensor, nn

from compressor import inspect
from compressor.data import Batch
from compressor.evaluation.cost import measure_latency
from compressor.io import open_checkpoint
from compressor.model import logits_of, open_runnable
from compressor.quantize import Quantization

RESULT = Path(__file__).parent / "results" / "real_models.json"
PACKAGES = Path(__file__).parent / "models" / "packages"
SUBJECTS = MODELS | STAND_INS
OURS, FOR_SPEED = "ours", "ours, for speed"
SPEED_SHARE = 0.6
WIDTHS = {8: "8", 4: "4g128", 3: "3g128", 2: "2g64"}
UNIFORM = tuple(f"{name} {width}" for name in ("nearest", "GPTQ") for width in WIDTHS.values())
METHODS = (OURS, FOR_SPEED, *UNIFORM)
EFFORT = "fast"

Found = dict[str, Any]


@dataclass(frozen=True)
class Predictions:
    """Of each example the mean loss in float64 and the share of right predictions, and the most likely classes."""

    losses: Tensor
    right: Tensor
    classes: Tensor


@torch.inference_mode()
def predicted(model: nn.Module, test: Sequence[Batch]) -> Predictions:
    """What a model predicts where there is something to predict."""
    model.eval()
    losses, right, classes = [], [], []
    for batch in test:
        logits, labels = logits_of(model, batch.inputs), batch.labels
        wanted = labels != IGNORED
        rows = wanted.nonzero()[:, 0]
        found = nn.functional.cross_entropy(logits[wanted].double(), labels[wanted], reduction="none")
        classes.append(logits[wanted].argmax(-1))
        for each, values in ((losses, found), (right, (classes[-1] == labels[wanted]).double())):
            sums = torch.zeros(len(labels), dtype=torch.float64).index_add(0, rows, values)
            each.append(sums / torch.bincount(rows, minlength=len(labels)))
    return Predictions(torch.cat(losses), torch.cat(right), torch.cat(classes))


@dataclass(frozen=True)
class Compared:
    """A model with its data, what it predicts itself, and its layers as `bytes.py` quantizes them."""

    name: str
    prepared: Prepared
    model: nn.Module

    @cached_property
    def dense(self) -> Predictions:
        return predicted(self.model, self.prepared.test)

    @cached_property
    def given(self) -> Given:
        layers = tuple(each.layer for each in inspect(self.model).layers if each.layer.eligible)
        return Batches(self.name, Setting(self.model, layers, 0, _none, _unmeasured), 0, Path(), self.prepared.batches)

    def quality(self, model: nn.Module) -> Found:
        """Loss and predictions of a model beside the dense one's."""
        after = predicted(model, self.prepared.test)
        groups = self.prepared.groups
        sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
        changes = sums.index_add(0, groups, after.losses - self.dense.losses) / torch.bincount(groups)
        return {
            "loss_increase": float(changes.mean()),
            "error": float(changes.std() / math.sqrt(len(changes))),
            "accuracy": float(after.right.mean()),
            "agreement": float((after.classes == self.dense.classes).double().mean()),
        }


@dataclass(frozen=True)
class Batches(Given):
    """The same calibration examples for all methods."""

    shown: Sequence[Mapping[str, Tensor]]

    @cached_property
    def batches(self) -> list[Mapping[str, Tensor]]:
        return list(self.shown)


def _none(_: Sequence[int]) -> Mapping[str, Tensor]:
    raise NotImplementedError


def _unmeasured(_: nn.Module) -> Measurement:
    raise NotImplementedError


# The methods.


def ours(compared: Compared, cell: Cell, folder: Path) -> Found:
    """What the command makes of the model's files, and takes for it."""
    prepared, output = compared.prepared, folder / "small"
    if prepared.factory is not None:
        output = output.with_suffix(".safetensors")
    command = [str(Path(sys.executable).with_name("compress")), str(prepared.source), "--keep", str(cell.share)]
    command += ["--calibration", str(prepared.calibration), *prepared.options, "--effort", EFFORT]
    command += ["--prefer", "size" if cell.method == OURS else "speed", "--output", str(output), "--json"]
    kept = prepared.calibration.with_name(f"{compared.name}-kept")
    command += ["--calibration-cache", str(kept)]
    first = not kept.exists()
    command += [] if prepared.factory is None else ["--model", prepared.factory]
    taken = run(command, folder)
    if taken.status:
        return {"refused": taken.said}
    small = open_runnable(output, prepared.factory).module.eval()
    stored = checked(compared, small, output)
    found: Found = {"share_stored": stored / compared.given.dense_bytes, "file": disk_bytes(output)}
    found |= {"effort": EFFORT, "first": first, "cpu_seconds": taken.cpu_seconds, "peak_bytes": taken.peak_bytes}
    found |= timed(compared, small)
    return found | compared.quality(rounded(small))


@dataclass(frozen=True)
class Taken:
    """A process that ended: its status, the last line of what it said, CPU time, and peak memory."""

    status: int
    said: str
    cpu_seconds: float
    peak_bytes: int


def run(command: Sequence[str], folder: Path) -> Taken:
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = [each.strip() for each in said.read().replace("\r", "\n").splitlines() if each.strip()]
    seconds = round(used.ru_utime + used.ru_stime, 1)
    return Taken(process.returncode, lines[-1] if lines else "", seconds, used.ru_maxrss * 1024)


def checked(compared: Compared, small: nn.Module, output: Path) -> int:
    """The bytes of the layers in the file, after a check that they are what the model runs."""
    stored = open_checkpoint(output).tensors
    state = small.state_dict()
    sizes, ran = {}, set[str]()
    places = {layer.module for layer in compared.given.setting.layers}
    of_layers = tuple(f"{place}." for place in places)
    for name, tensor in ((name, each) for name, each in stored.items() if name.startswith(of_layers)):
        held = state.get(name)
        if held is None or tuple(held.shape) != tuple(tensor.shape) or held.dtype != tensor.dtype:
            raise RuntimeError(f"{name} is not in the model as it is in {output}")
        sizes[name] = file_bytes(tensor.shape, tensor.dtype)
    hooks = [
        small.get_submodule(place).register_forward_hook(lambda *_, place=place: ran.add(place)) for place in places
    ]
    with torch.inference_mode():
        logits_of(small, compared.prepared.test[0][:1].inputs)
    for hook in hooks:
        hook.remove()
    if ran != places:
        raise RuntimeError(f"a forward does not run {sorted(places - ran)[0]}")
    return compared.given.stored(sizes)


def timed(compared: Compared, small: nn.Module) -> Found:
    """The time of one example beside the dense model's, both in the dtype of the file."""
    dtype = next(each.dtype for each in small.parameters() if each.is_floating_point())
    dense = copy.deepcopy(compared.model).to(dtype)
    latency = measure_latency(small, compared.prepared.test[0][:1].inputs, baseline=dense, device="cpu")
    return {
        "latency": latency.ratio,
        "dense_seconds": latency.baseline_seconds,
        "dtype": str(dtype).removeprefix("torch."),
    }


def disk_bytes(output: Path) -> int:
    """Of weight files alone."""
    files = output.glob("*.safetensors") if output.is_dir() else [output]
    return sum(each.stat().st_size for each in files)


def uniform(compared: Compared, cell: Cell, _: Path) -> Found:
    """All layers at one width."""
    name, width = cell.method.split()
    started = time.process_time()
    quantize = nearest_matrices if name == "nearest" else gptq_matrices
    matrices = quantize(compared.given, Quantization.of(width))
    seconds = round(time.process_time() - started, 1)
    model, stored = with_matrices(compared.given, matrices)
    found = {"share_stored": stored / compared.given.dense_bytes, "cpu_seconds": seconds}
    return found | compared.quality(model)


@dataclass(frozen=True)
class Cell:
    """What is measured once."""

    model: str
    method: str
    share: float | None

    def measure(self, compared: Compared) -> Found:
        with tempfile.TemporaryDirectory() as folder:
            return (ours if self.share is not None else uniform)(compared, self, Path(folder))


def cells(asked: argparse.Namespace) -> Iterator[Cell]:
    for model in asked.models:
        for method in asked.methods:
            if method == OURS:
                yield from (Cell(model, method, share) for share in asked.shares)
            else:
                yield Cell(model, method, SPEED_SHARE if method == FOR_SPEED else None)


class Results:
    """The file of results: each cell is written as it is measured."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def document(self) -> dict[str, Any]:
        """As it is now: another run may write other cells."""
        empty: dict[str, Any] = {"versions": VERSIONS, "models": {}, "rows": []}
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else empty

    def put_model(self, name: str, about: Mapping[str, Any]) -> None:
        document = self.document
        document["models"][name] = about
        document["models"] = {each: document["models"][each] for each in SUBJECTS if each in document["models"]}
        self._write(document)

    def put(self, cell: Cell, found: Mapping[str, Any]) -> None:
        """Write a cell in place of what was known of it, in a fixed order."""
        sys.stderr.write(f"{vars(cell)} {dict(found)}\n")
        document = self.document
        rows = [row for row in document["rows"] if not vars(cell).items() <= row.items()] + [vars(cell) | found]
        models = list(SUBJECTS)
        rows.sort(key=lambda row: (models.index(row["model"]), METHODS.index(row["method"]), -(row["share"] or 0)))
        self._write(document | {"rows": rows})

    def _write(self, document: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


def measure(results: Results, asked: argparse.Namespace) -> None:
    """Every cell that is missing, or all where they are asked for again."""
    missing = [cell for cell in cells(asked) if asked.again or not has(results.document["rows"], vars(cell))]
    for name, own in groupby(missing, lambda cell: cell.model):
        subject = SUBJECTS[name]
        prepared = subject.prepare(unpacked(subject.packages, asked.packages))
        measure_model(results, name, prepared=prepared, own=own)


def measure_model(results: Results, name: str, *, prepared: Prepared, own: Iterable[Cell]) -> None:
    """Cells of one model."""
    model = open_runnable(prepared.source, prepared.factory).module.float().eval()
    compared = Compared(name, prepared, model)
    dense = compared.dense
    results.put_model(
        name,
        {
            "about": SUBJECTS[name].about,
            "predicts": SUBJECTS[name].predicts,
            "file": prepared.source.stat().st_size if prepared.source.is_file() else weight_bytes(prepared.source),
            "layer_bytes": compared.given.dense_bytes,
            "loss": float(dense.losses.mean()),
            "accuracy": float(dense.right.mean()),
            "predictions": len(dense.classes),
            "packages": [
                {"name": f"{each.name} {each.version}", "license": each.license, "stated_in": each.stated_in}
                for each in SUBJECTS[name].packages
            ],
        },
    )
    for cell in own:
        results.put(cell, cell.measure(compared))


def weight_bytes(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.iterdir() if each.name.startswith(("model", "pytorch_model")))


# Tables.


def beside_others(document: Mapping[str, Any]) -> str:
    """Ours beside all layers in 8, 4, and 3 bits: share of the 16-bit bytes, and loss increase with its error."""
    lines = [line(["model", "beside", "ours", "rounded to nearest", "GPTQ", "latency", "CPU time", "memory"])]
    lines.append("|---" * 8 + "|")
    for model, rows in by_model(document):
        for bits in (8, 4, 3):
            share = BESIDE[bits]
            at = {row["method"]: row for row in rows if row["share"] in (None, share)}
            if OURS not in at:
                continue
            others = [at.get(f"{name} {WIDTHS[bits]}") for name in ("nearest", "GPTQ")]
            lines.append(line([model, f"int{bits}", *map(_quality, [at[OURS], *others]), *_costs(at[OURS])]))
        for row in rows:
            if row["method"] == FOR_SPEED:
                lines.append(line([model, "for speed", _quality(row), "", "", *_costs(row)]))
    return "\n".join(lines)


def accuracies(document: Mapping[str, Any]) -> str:
    """Accuracy, and agreement with the dense model, of every cell."""
    lines = [line(["model", "method", "bytes", "file", "loss increase", "accuracy", "agreement"]), "|---" * 7 + "|"]
    for model, rows in by_model(document):
        about = document["models"][model]
        lines.append(line([model, "dense", "", _megabytes(about["file"]), "", f"{about['accuracy']:.1%}", ""]))
        for row in rows:
            if "refused" in row:
                lines.append(line([model, row["method"], f"{row['share']:.1%}", "", "refused", "", ""]))
                continue
            loss = f"{row['loss_increase']:+.4f} ± {row['error']:.4f}"
            size = _megabytes(row["file"]) if "file" in row else ""
            quality = [f"{row['accuracy']:.1%}", f"{row['agreement']:.1%}"]
            lines.append(line([model, row["method"], f"{row['share_stored']:.1%}", size, loss, *quality]))
    return "\n".join(lines)


def packages(document: Mapping[str, Any]) -> str:
    """What the models and their data come from."""
    lines = [line(["model", "predicts", "dense", "packages"]), "|---" * 4 + "|"]
    for model, about in document["models"].items():
        named = "; ".join(f"`{each['name']}` ({each['license']}: {each['stated_in']})" for each in about["packages"])
        dense = f"{about['loss']:.3f} nats, {about['accuracy']:.1%} right of {about['predictions']:,}"
        lines.append(line([f"{model}: {about['about']}", about["predicts"], dense, named]))
    return "\n".join(lines)


def _quality(row: Mapping[str, Any] | None) -> str:
    if row is None or "loss_increase" not in row:
        return "" if row is None else "refused"
    return f"{row['share_stored']:.1%}: {row['loss_increase']:.3f} ± {row['error']:.3f}"


def _costs(row: Mapping[str, Any]) -> list[str]:
    if "cpu_seconds" not in row:
        return ["", "", ""]
    # Of later sizes, for which measurements were kept, it is what they take besides.
    taken = f"{row['cpu_seconds'] / 60:.1f} min" + ("" if row["first"] else " more")
    return [f"{row['latency']:.2f}x" if "latency" in row else "", taken, f"{row['peak_bytes'] / 1e9:.1f} GB"]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--shares", nargs="+", type=float, default=tuple(BESIDE.values()), help="of ours")
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="the folder that they are unpacked in")
    parser.add_argument("--again", action="store_true", help="measure what is there already too")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="a bundled model in their place, and no package")
    asked = parser.parse_args()
    if asked.quick:
        asked.models, asked.shares = [STAND_IN], (BESIDE[4],)
        asked.methods = [OURS, "nearest 4g128", "GPTQ 4g128"]
    torch.set_num_threads(1)
    results = Results(asked.output)
    measure(results, asked)
    document = results.document
    sys.stdout.write("\n\n".join(each(document) for each in (beside_others, accuracies, packages)) + "\n")


if __name__ == "__main__":
    main()
