"""Loss against bytes: bits and ranks from one budget beside each alone, uniform widths, and other quantizers.

    OMP_NUM_THREADS=1 python benchmarks/bytes.py [--models MODEL ...] [--methods METHOD ...] [--shares 0.25 ...]
                                                [--draws 0 ...] [--peers FOLDER] [--again] [--quick --output FILE]

Takes the reference models, and the larger language model where `benchmarks/larger_model.py` has trained it, with three
draws of calibration examples each, of the training split, and measures the loss on the test split:

- `ours`: `compress --bits auto` at shares of the bytes that the linear and convolutional layers take in 16 bits; also
  from the seed of the initialization, with bits alone, and with ranks alone.
- `nearest`, `GPTQ`, and `two-sided`: all of these layers at one width, by our code: to the nearest with searched
  scales; with the error carried to the columns that are not rounded yet, on the inputs that the quantized model gives;
  and in the metric of the loss, where it is carried to the rows too, as in `ours`.
- llm-compressor, AutoRound, and torchao, of the language models: their own code in environments of their own, which
  `benchmarks/peers/environments.py FOLDER` makes, on the same examples.

Bytes are those of the layers' tensors in the files, without biases: scales, zero points, and shapes are among them.
Floating-point numbers count two bytes, and are rounded to float16 before the loss is measured. What is left as it was
counts in full. An error is the standard error of the mean change in loss over the test examples; a loss within one
error is called lossless. Nothing is chosen by the test split.

Cells are kept one by one in benchmarks/results/bytes.json, and those that are there are not measured again: an
interrupted run goes on. `--again` measures what is asked for anew. Prints the tables of benchmarks/README.md;
`benchmarks/plot_bytes.py` draws them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from baselines import Products, in_forward_order, matrices, set_matrix
from initial import REFERENCES, reference
from quality import BATCH_SIZE, SUBJECTS, TEST, Measurement, Setting, example_losses, opened, setting
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor import BadInput, CalibrationSettings, compress
from compressor.factorize import Metric
from compressor.io import StoredTensor, open_checkpoint
from compressor.quantize import Quantization, QuantizationSettings, QuantizedMatrix, gptq, quantize_to_nearest

RESULT = Path(__file__).parent / "results" / "bytes.json"
PEER_SCRIPTS = Path(__file__).parent / "peers"
SHARES = (0.5, 0.375, 0.31, 0.25, 0.2, 0.16, 0.13, 0.1)
DRAWS = (0, 1, 2)
# At which a model is to be lossless, besides.
FURTHER_SHARES = {"digits-mlp": (0.03,), "digits-resnet": (0.12,), "digits-vit": (0.12,), "stdlib-llama": (0.4,)}
SCALES = torch.float16
ONE_PASS = QuantizationSettings(rounds=0)
UNIFORM = ("8", "6g128", "5g128", "4g128", "4g32", "3g128", "3g32", "2g64", "2g32")
"""Names of quantizations, each for all layers; a group size that does not divide a layer's inputs is fitted to it."""


@dataclass(frozen=True)
class Given:
    """A model with the calibration examples of one draw, and a folder for what all sizes have in common."""

    name: str
    setting: Setting
    draw: int
    kept: Path

    @property
    def model(self) -> nn.Module:
        return self.setting.model

    @cached_property
    def chosen(self) -> list[int]:
        order = torch.randperm(self.setting.count, generator=torch.Generator().manual_seed(self.draw)).tolist()
        return order[: SUBJECTS[self.name].calibration_examples]

    @cached_property
    def batches(self) -> list[Mapping[str, Tensor]]:
        starts = range(0, len(self.chosen), BATCH_SIZE)
        return [self.setting.read(self.chosen[start : start + BATCH_SIZE]) for start in starts]

    @cached_property
    def dense(self) -> Measurement:
        return self.setting.measure(self.model)

    @property
    def dense_bytes(self) -> int:
        return 2 * sum(layer.parameters for layer in self.setting.layers)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {layer.module: self.model.get_submodule(layer.module) for layer in self.setting.layers}

    def stored(self, sizes: Mapping[str, int]) -> int:
        """The bytes of the layers among the bytes of tensors by name."""
        own = tuple(f"{layer.module}." for layer in self.setting.layers)
        return sum(size for name, size in sizes.items() if name.startswith(own) and not name.endswith(".bias"))


@dataclass(frozen=True)
class Outcome:
    """What a method made: the bytes of the layers, and the loss in nats with its increase over the dense model's."""

    stored: int
    measured: Mapping[str, float]
    versions: Mapping[str, str] | None = None


def outcome(given: Given, model: nn.Module, stored: int) -> Outcome:
    """What is measured of a model."""
    found = given.setting.measure(model)
    assert found.error is not None
    assert found.divergence is not None
    measured = {"loss": found.loss, "loss_increase": found.loss - given.dense.loss, "error": found.error}
    measured["divergence"] = found.divergence
    if found.accuracy is not None and given.dense.accuracy is not None:
        measured["accuracy_drop"] = given.dense.accuracy - found.accuracy
    return Outcome(stored, measured)


# Ours.


def ours(given: Given, share: float, **options: Any) -> Outcome:
    """`compress` at a share of the 16-bit bytes."""
    small = compressed(given, share, **options)
    return sized(given, share, small, tensors=small.state_dict())


def from_seed(given: Given, share: float) -> Outcome:
    """Ours with the initialization as a seed, as its file has it: what is loaded is dense."""
    started = reference(given.name)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "small.safetensors"
        small = compressed(given, share, initial=started.seed, factory=started.build, output=output)
        return sized(given, share, small, tensors=open_checkpoint(output).tensors)


def compressed(given: Given, share: float | None, **options: Any) -> nn.Module:
    """What `compress` makes of the model, with options beside those that all methods are given, or in their place."""
    asked: dict[str, Any] = {"bits": "auto", "prefer": "size", "calibration": given.batches, "seed": given.draw}
    # Moments, decompositions, and errors are the same at all sizes.
    asked["calibration_cache"] = given.kept / ("from the seed" if "initial" in options else "of the model")
    asked["calibration_settings"] = CalibrationSettings(uniform=False)
    if share is not None:
        asked["keep"] = share
    small: nn.Module = compress(given.model, **asked | options).model
    return small


def sized(given: Given, share: float, small: nn.Module, *, tensors: Mapping[str, Tensor | StoredTensor]) -> Outcome:
    """What is measured of a model that is stored as these tensors."""
    sizes = {name: file_bytes(each.shape, each.dtype) for name, each in tensors.items()}
    stored = given.stored(sizes)
    if stored > share * given.dense_bytes:
        raise RuntimeError(f"{given.name}, {share}: stores {stored / given.dense_bytes:.4f} of the bytes")
    return outcome(given, rounded(small), stored)


def file_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor whose floating-point numbers are stored in 16 bits."""
    return math.prod(shape) * (min(dtype.itemsize, 2) if dtype.is_floating_point else dtype.itemsize)


@torch.no_grad()
def rounded(model: nn.Module) -> nn.Module:
    """The model with its floating-point numbers rounded to float16, in place."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float32:
            tensor.copy_(tensor.half())
    return model


# All layers at one width, by our code.


def nearest(given: Given, quantization: Quantization) -> Outcome:
    return of_matrices(given, nearest_matrices(given, quantization))


def nearest_matrices(given: Given, quantization: Quantization) -> dict[str, QuantizedMatrix]:
    return {
        name: quantize_to_nearest(matrix, quantization.fitted(matrix.shape[1]), scale_dtype=SCALES)
        for name, matrix in matrices(given.modules).items()
    }


def by_gptq(given: Given, quantization: Quantization) -> Outcome:
    return of_matrices(given, gptq_matrices(given, quantization))


def gptq_matrices(given: Given, quantization: Quantization) -> dict[str, QuantizedMatrix]:
    """GPTQ in forward order, each layer on the inputs that the quantized ones before it give."""
    quantized: dict[str, QuantizedMatrix] = {}

    def refit(name: str, weight: Tensor, inputs: Products) -> Tensor:
        outputs = torch.ones(len(weight), dtype=weight.dtype)
        metric = Metric(inputs.compressed / inputs.compressed.diagonal().mean(), outputs)
        fitted = quantization.fitted(weight.shape[1])
        quantized[name] = gptq(weight, fitted, metric, scale_dtype=SCALES, settings=ONE_PASS)
        return quantized[name].product()

    in_forward_order(given.model, given.modules, given.batches, refit=refit, with_dense_inputs=False)
    return quantized


def two_sided(given: Given, bits: int) -> Outcome:
    """Our quantization in the metric of the loss, by inputs and outputs, without compensation and refinement."""
    alone = CalibrationSettings(compensate=False, refine=False, recalibration_rounds=0, uniform=False)
    small = compressed(given, None, bits=bits, calibration_settings=alone)
    found = sized(given, 1.0, small, tensors=small.state_dict())
    if found.stored > (bits + 1) / 16 * given.dense_bytes:
        raise BadInput(f"not every layer may have {bits} bits", remedy="leave this width out")
    return found


def of_matrices(given: Given, quantized: Mapping[str, QuantizedMatrix]) -> Outcome:
    model, stored = with_matrices(given, quantized)
    return outcome(given, model, stored)


def with_matrices(given: Given, quantized: Mapping[str, QuantizedMatrix]) -> tuple[nn.Module, int]:
    """The model with some matrices quantized, and the bytes of its layers."""
    model, stored = copy.deepcopy(given.model), given.dense_bytes
    for name, matrix in quantized.items():
        set_matrix(model.get_submodule(name), matrix.product())
        stored += sum(tensor.nbytes for tensor in matrix.tensors().values()) - 2 * math.prod(matrix.shape)
    return model, stored


# Other quantizers, which run in environments of their own.


@dataclass(frozen=True)
class Peer:
    """A method of a script in benchmarks/peers, and the environment that it runs in."""

    environment: str
    script: str
    method: str


def of_peer(given: Given, peer: Peer, environments: Path) -> Outcome:
    """A folder written by a peer, as the peer's own environment loads and runs it."""
    test = opened(given.name, "test", SUBJECTS[given.name].test_examples)
    shown = test.read(range(test.count))
    with tempfile.TemporaryDirectory() as folder:
        windows, output = Path(folder) / "windows.safetensors", Path(folder) / "quantized"
        calibration = given.setting.read(given.chosen)["input_ids"]
        save_file({"calibration": calibration.contiguous(), "test": shown.inputs["input_ids"].contiguous()}, windows)
        command = [environments / peer.environment / "bin" / "python", PEER_SCRIPTS / peer.script, peer.method]
        ran = subprocess.run(
            [*map(str, [*command, SUBJECTS[given.name].weights, windows, output])],
            capture_output=True,
            text=True,
            check=False,
        )
    if ran.returncode:
        raise RuntimeError(f"{peer}: {ran.stderr[-2000:]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    with torch.inference_mode():
        dense = example_losses(given.model, shown)
    losses = torch.tensor(found["losses"], dtype=torch.float64)
    changes = losses - dense
    measured = {
        "loss": float(losses.mean()),
        "loss_increase": float(changes.mean()),
        "error": float(changes.std() / math.sqrt(len(changes))),
    }
    return Outcome(given.stored(found["bytes"]), measured, found["versions"])


# The methods, by the names that they have in the tables.

FROM_SEED = "ours, from the seed"
OURS: dict[str, Callable[[Given, float], Outcome]] = {
    "ours": ours,
    FROM_SEED: from_seed,
    "bits alone": partial(
        ours, calibration_settings=CalibrationSettings(truncation_penalties=(math.inf,), uniform=False)
    ),
    "ranks alone": partial(ours, bits="16"),
}
UNIFORM_METHODS: dict[str, Callable[[Given], Outcome]] = {
    f"{name} {quantization}": partial(method, quantization=Quantization.of(quantization))
    for name, method in (("nearest", nearest), ("GPTQ", by_gptq))
    for quantization in UNIFORM
} | {f"two-sided {bits}": partial(two_sided, bits=bits) for bits in (8, 6, 5, 4, 3, 2)}
PEERS = {
    f"{name} {method}": Peer(environment, script, method)
    for name, environment, script, methods in (
        (
            "llm-compressor",
            "llm-compressor",
            "with_llm_compressor.py",
            ("GPTQ W8A16", "GPTQ W4A16", "GPTQ W3A16", "GPTQ W2A16", "AWQ W8A16", "AWQ W4A16", "AWQ W4A16_ASYM"),
        ),
        ("AutoRound", "auto-round", "with_auto_round.py", ("W4A16 g128", "W3A16 g128", "W2A16 g128", "W2A16 g32")),
        (
            "torchao",
            "torchao",
            "with_torchao.py",
            ("int8", "int4 g128", "int4 g32", "int4 HQQ g128", "int4 HQQ g32"),
        ),
    )
    for method in methods
}
METHODS = (*OURS, *UNIFORM_METHODS, *PEERS)
# Their result does not depend on the examples.
WITHOUT_DATA = ("nearest", "torchao")


class Results:
    """The file of results: its cells by what they are of, each written as it is measured."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """As they are now: another run may write other cells."""
        return json.loads(self.path.read_text(encoding="utf-8"))["rows"] if self.path.exists() else []

    def put(self, cell: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Write a cell in place of what was known of it, in a fixed order."""
        sys.stderr.write(f"{dict(cell)} {dict(found)}\n")
        rows = [row for row in self.rows if not cell.items() <= row.items()] + [{**cell, **found}]
        models = list(SUBJECTS)
        rows.sort(
            key=lambda row: (
                models.index(row["model"]),
                METHODS.index(row["method"]),
                -(row["share"] or 0),
                -1 if row["draw"] is None else row["draw"],
            )
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"versions": VERSIONS, "rows": rows}, indent=1) + "\n", encoding="utf-8")


VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


def has(rows: Iterable[Mapping[str, Any]], cell: Mapping[str, Any]) -> bool:
    """Whether a cell is among the rows."""
    return any(cell.items() <= row.items() for row in rows)


@dataclass(frozen=True)
class Cell:
    """What is measured once: of a model, a method, a share where it takes one, and a draw where it takes examples."""

    model: str
    method: str
    share: float | None
    draw: int | None

    def measure(self, given: Given, environments: Path | None) -> Outcome:
        if self.method in OURS:
            assert self.share is not None
            return OURS[self.method](given, self.share)
        if self.method in UNIFORM_METHODS:
            return UNIFORM_METHODS[self.method](given)
        assert environments is not None
        return of_peer(given, PEERS[self.method], environments)


def cells(asked: argparse.Namespace) -> Iterator[Cell]:
    """All that is asked for, a model and a draw after another."""
    for model in asked.models:
        for draw in asked.draws:
            for method in asked.methods:
                if method in PEERS and (asked.peers is None or SUBJECTS[model].data != "builtin:stdlib"):
                    continue
                if method == FROM_SEED and model not in REFERENCES:
                    continue
                if method.startswith(WITHOUT_DATA):
                    if draw == asked.draws[0]:
                        yield Cell(model, method, None, None)
                elif method in OURS:
                    shares = asked.shares or sorted({*SHARES, *FURTHER_SHARES.get(model, ())}, reverse=True)
                    yield from (Cell(model, method, share, draw) for share in shares)
                else:
                    yield Cell(model, method, None, draw)


def measure(results: Results, asked: argparse.Namespace) -> None:
    """Every cell that is missing, or all where they are asked for again."""
    known = results.rows
    missing = [cell for cell in cells(asked) if asked.again or not has(known, vars(cell))]
    settings: dict[str, Setting] = {}
    for (model, draw), own in groupby(missing, lambda cell: (cell.model, cell.draw)):
        if model not in settings:
            settings = {model: setting(model, TEST)}
        with tempfile.TemporaryDirectory() as kept:
            measure_cells(results, Given(model, settings[model], draw or 0, Path(kept)), own, environments=asked.peers)


def measure_cells(results: Results, given: Given, own: Iterable[Cell], *, environments: Path | None) -> None:
    """Cells of one model and draw."""
    for cell in own:
        started = _cpu_seconds()
        try:
            found = cell.measure(given, environments)
        except BadInput as refused:
            results.put(vars(cell), {"refused": str(refused)})
            continue
        about: dict[str, Any] = {"stored": found.stored / given.dense_bytes, **found.measured}
        about["cpu_seconds"] = round(_cpu_seconds() - started, 1)
        if found.versions is not None:
            about["versions"] = found.versions
        results.put(vars(cell), about)


def _cpu_seconds() -> float:
    """Of this process, and of those that it ran."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# Tables.


def curves(document: Mapping[str, Any]) -> str:
    """Loss increase by size, a table a model: mean (least to most of the draws), in bold where it is lossless.

    `error` is that of ours.

    `best other` is the least mean loss of any method that is not ours, at no more bytes.
    """
    blocks = []
    for model, rows in by_model(document):
        shares = _shares(rows)
        shown = [method for method in OURS if any(row["method"] == method for row in rows)]
        if not shown:
            continue
        lines = [line([f"{model}, bytes", *shown, "best other", "error"]), "|---" * (len(shown) + 3) + "|"]
        points = points_of(rows)
        for share in shares:
            at = {method: _at(points, method, share) for method in shown}
            rival = best_other(points, share)
            named = "" if rival is None else f"{rival.cell} {rival.method}"
            own = at.get("ours")
            error = "" if own is None else f"{own.error:.4f}"
            refused = {row["method"] for row in rows if row["share"] == share and "refused" in row}
            found = [("-" if each in refused else "") if at[each] is None else at[each].cell for each in at]
            lines.append(line([_percent(share), *found, named, error]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def losses_to_others(document: Mapping[str, Any]) -> str:
    """Where another method loses less than ours at no more bytes, by more than the draws of either are apart."""
    lines = [line(["model", "bytes", "ours", "other", "errors", "divergences"]), "|---" * 6 + "|"]
    for model, rows in by_model(document):
        points = points_of(rows)
        for share in _shares(rows):
            ours, rival = _at(points, "ours", share), best_other(points, share)
            if ours is None or rival is None or ours.mean - rival.mean <= max(ours.spread, rival.spread):
                continue
            cells = [_percent(share), ours.cell, f"{rival.cell} {rival.method}"]
            errors = f"{ours.error:.4f}, {rival.error:.4f}"
            lines.append(line([model, *cells, errors, f"{ours.divergence:.4f}, {rival.divergence:.4f}"]))
    return "\n".join(lines)


def points(document: Mapping[str, Any]) -> str:
    """All layers at one width, by our code and by that of others: share of the bytes, and loss increase."""
    names = [model for model, _ in by_model(document)]
    found = {model: {point.method: point for point in points_of(rows)} for model, rows in by_model(document)}
    lines = [line(["", *names]), "|---" * (len(names) + 1) + "|"]
    for method in (*UNIFORM_METHODS, *PEERS):
        at = [found[model].get(method) for model in names]
        if any(at):
            lines.append(line([method, *("" if each is None else f"{each.stored:.1%}: {each.cell}" for each in at)]))
    return "\n".join(lines)


# Sizes of ours that stand beside layers all of so many bits.
BESIDE = {8: 0.5, 4: 0.25, 3: 0.2, 2: 0.13}
# The groups of other methods in the bits at which something is lost.
GROUPS = {
    4: ("4g128", "W4A16", "W4A16 g128"),
    3: ("3g128", "W3A16", "W3A16 g128"),
    2: ("2g64", "W2A16", "W2A16 g128"),
}
OTHERS = {"rounded to nearest": ("nearest",), "GPTQ": ("GPTQ", "llm-compressor GPTQ"), "AutoRound": ("AutoRound",)}


def beside_others(document: Mapping[str, Any]) -> str:
    """Ours beside all layers in 4, 3, and 2 bits: share of the 16-bit bytes, and mean loss increase.

    Of two implementations of GPTQ the better one is shown.
    """
    lines = [line(["model", "beside", "ours", *OTHERS]), "|---" * (3 + len(OTHERS)) + "|"]
    for model, rows in by_model(document):
        points = points_of(rows)
        for bits, groups in GROUPS.items():
            ours = _at(points, "ours", BESIDE[bits])
            if ours is None:
                continue
            found = [ours]
            for names in OTHERS.values():
                methods = {f"{name} {group}" for name in names for group in groups}
                of_name = [point for point in points if point.method in methods]
                found.append(min(of_name, key=lambda point: point.mean, default=None))
            cells = ["" if each is None else f"{each.stored:.1%}: {_nats(each.mean)}" for each in found]
            lines.append(line([model, f"int{bits}", *cells]))
    return "\n".join(lines)


@dataclass(frozen=True)
class Point:
    """A method at a size: the mean share of the bytes, the losses of the draws, and their mean standard error.

    `divergence` is the mean Kullback-Leibler divergence from the dense model's predictions.
    """

    method: str
    share: float | None
    stored: float
    losses: tuple[float, ...]
    error: float
    divergence: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)

    @property
    def spread(self) -> float:
        return max(self.losses) - min(self.losses)

    @property
    def lossless(self) -> bool:
        return self.mean <= self.error

    @property
    def cell(self) -> str:
        text = _nats(self.mean)
        if len(self.losses) > 1:
            text += f" ({_nats(min(self.losses))} to {_nats(max(self.losses))})"
        return f"**{text}**" if self.lossless else text


def _shares(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The sizes that were asked for, the largest first."""
    return sorted({row["share"] for row in rows if row["share"]}, reverse=True)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace(".0%", "%")


def _nats(loss: float) -> str:
    text = f"{loss:.4f}" if abs(loss) < 0.1 else f"{loss:.3f}"
    return text.replace("-0.0000", "0.0000")


def best_other(points: Sequence[Point], share: float) -> Point | None:
    """What loses least of all that is not ours and takes no more bytes than a share of them."""
    others = [
        point for point in points if not point.method.startswith("ours") and (point.share or point.stored) <= share
    ]
    return min(others, key=lambda point: point.mean, default=None)


def points_of(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """What is known of each method at each size."""
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "loss_increase" in row:
            groups.setdefault((row["method"], row["share"]), []).append(row)
    return [
        Point(
            method,
            share,
            statistics.mean(row["stored"] for row in own),
            tuple(row["loss_increase"] for row in own),
            statistics.mean(row["error"] for row in own),
            statistics.mean(row.get("divergence", math.nan) for row in own),
        )
        for (method, share), own in groups.items()
    ]


def _at(points: Sequence[Point], method: str, share: float) -> Point | None:
    return next((point for point in points if (point.method, point.share) == (method, share)), None)


def by_model(document: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of each model."""
    return [(model, list(rows)) for model, rows in groupby(document["rows"], key=lambda row: row["model"])]


def line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--shares", nargs="+", type=float, help="default: 0.5 to 0.1, and one at which the model is to be lossless"
    )
    parser.add_argument("--draws", nargs="+", type=int, default=DRAWS)
    parser.add_argument("--peers", type=Path, help="the folder of environments.py; without it they are left out")
    parser.add_argument("--again", action="store_true", help="measure what is there already too")
    parser.add_argument("--quick", action="store_true", help="digits-mlp at two sizes, one draw")
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    if asked.quick:
        asked.models, asked.shares, asked.draws, asked.peers = ["digits-mlp"], (0.25, 0.1), (0,), None
    for model in [name for name in asked.models if not SUBJECTS[name].weights.exists()]:
        sys.stderr.write(f"{model} is left out: train it with benchmarks/larger_model.py\n")
        asked.models.remove(model)
    torch.set_num_threads(1)
    results = Results(asked.output)
    measure(results, asked)
    document = {"rows": results.rows}
    sys.stdout.write(f"{curves(document)}\n\n{points(document)}\n")


if __name__ == "__main__":
    main()
